"""What the module of the kernels in C is given: a wrong array or number is an exception, whatever it is, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.built_kernels import BUILT, needs_module

pytestmark = needs_module


def room(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.full(shape, 77, dtype=dtype)


HALVES = np.ones((4, 128), dtype=np.uint16)
FLOATS = np.ones((4, 128), dtype=np.float32)
BYTES = np.ones((4, 64), dtype=np.uint8)
DOUBLES = np.ones((1, 128), dtype=np.float64)
WORDS = np.ones((4, 6), dtype=np.uint32)

# Arguments that are right, the last of them the room for the result.
RIGHT: dict[str, tuple[Any, ...]] = {
    "weight_only_scales": (HALVES, "bfloat16", 2, 8, room(4, 2, dtype=np.float32)),
    "weight_only_codes": (np.ones((8, 128), dtype=np.uint16), "float16", 2, 4, 4, True, room(8, 2, dtype=np.float32), room(2, 256)),
    "float8_scales": (FLOATS, "float32", 2, 1200.0, room(4, 2, dtype=np.float32)),
    "float8_codes": (HALVES, "bfloat16", 1, 1200.0, room(4, 1, dtype=np.float32), room(4, 128)),
    "float8_rescaled": (BYTES, 1.0, 2.0, room(4, 64)),
    "cast": (HALVES, "bfloat16", "float32", room(4, 128, dtype=np.float32)),
    "arranged": (BYTES, 8, 2, True, room(2, 128)),
    "gguf_numbers": (np.ones((4, 36), dtype=np.uint8), "Q4_0", "float32", room(4, 64, dtype=np.float32)),
    "transposed": (WORDS, room(6, 4, dtype=np.uint32)),
    "awq_codes": (WORDS, room(48, 2)),
    "column_magnitudes": (HALVES, room(1, 128, dtype=np.uint16)),
    "smoothed_magnitudes": (HALVES, DOUBLES, room(1, 4, dtype=np.uint16)),
    "smoothed": (HALVES, DOUBLES, room(1, 4, dtype=np.uint16), room(4, 128, dtype=np.uint16)),
    "smoothed_codes": (HALVES, np.ones((1, 4), dtype=np.float32), "half", room(4, 128)),
}


def wrong_arrays(right: np.ndarray) -> dict[str, Any]:
    """Arrays that are like a right one but for one thing."""
    wide = np.zeros((right.shape[0], 2 * right.shape[1]), dtype=right.dtype)
    moved = np.zeros(right.nbytes + 1, dtype=np.uint8)[1:].view(right.dtype).reshape(right.shape)
    wrong = {
        "nothing": None,
        "text": "array",
        "bytes": b"1234",
        "of another type": np.zeros(right.shape, dtype=np.int64),
        "of signed integers": np.zeros(right.shape, dtype=f"i{right.itemsize}"),
        "of the other order of bytes": np.zeros(right.shape, dtype=">u8"),
        "with one axis more": right[None],
        "without an axis": np.zeros((), dtype=right.dtype),
        "every second column": wide[:, ::2],
        "backwards": right[::-1],
        "of equal rows": np.broadcast_to(right[:1], right.shape),
        "one row less": right[1:].copy(),
        "one row more": np.concatenate([right, right[:1]]),
        "one column less": right[:, 1:].copy(),
        "one column more": np.concatenate([right, right[:, :1]], axis=1),
        "flat": right.reshape(-1),
        "empty": right[:0],
        "without columns": right[:, :0].copy(),
        **({"not aligned": moved} if right.itemsize > 1 else {}),
    }
    of_one_row = ("backwards", "of equal rows", "flat") if len(right) == 1 else ()  # the same then
    return {kind: array for kind, array in wrong.items() if kind not in of_one_row}


def call(name: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(BUILT, name)(*arguments)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_done(name: str) -> None:
    *given, out = RIGHT[name]
    result = np.full_like(out, 77)
    assert call(name, (*given, result)) in (None, True)
    assert not np.all(result == 77)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("place", [0, -1], ids=["given", "out"])
def test_a_wrong_array_is_refused(name: str, place: int) -> None:
    arguments = list(RIGHT[name])
    out = np.full_like(arguments[-1], 77)
    for kind, wrong in wrong_arrays(arguments[place]).items():
        if name == "column_magnitudes" and place == 0 and kind in ("one row less", "one row more", "empty"):
            continue  # of any number of rows
        tried = [*arguments[:-1], out]
        tried[place] = wrong
        with pytest.raises((ValueError, TypeError, BufferError)):
            pytest.fail(f"{kind}: {call(name, tuple(tried))}")
    assert np.all(out == 77)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("weight_only_codes", 6),
        ("float8_codes", 4),
        ("smoothed_magnitudes", 1),
        ("smoothed", 1),
        ("smoothed", 2),
        ("smoothed_codes", 1),
    ],
)
def test_wrong_scales_and_wrong_room_for_them_are_refused(name: str, place: int) -> None:
    arguments = [*RIGHT[name][:-1], np.full_like(RIGHT[name][-1], 77)]
    for kind, wrong in wrong_arrays(arguments[place]).items():
        with pytest.raises((ValueError, TypeError, BufferError)):
            pytest.fail(f"{kind}: {call(name, (*arguments[:place], wrong, *arguments[place + 1 :]))}")
    assert np.all(arguments[-1] == 77)


@pytest.mark.parametrize("name", RIGHT)
def test_room_that_may_not_be_written_is_refused(name: str) -> None:
    *given, out = RIGHT[name]
    fixed = out.copy()
    fixed.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        call(name, (*given, fixed))


WRONG_NUMBERS: list[tuple[str, int, Any]] = [
    *[("weight_only_scales", 2, segments) for segments in (0, -1, 3, 129, 1 << 62, 1.5, None)],
    *[("weight_only_scales", 3, bits) for bits in (0, 2, -8, 1 << 40)],
    *[("weight_only_scales", 1, kind) for kind in ("float32", "float8_e4m3fn", "int16", "", None)],
    *[("weight_only_codes", 1, kind) for kind in ("float32", "float8_e4m3fn", "")],
    *[("weight_only_codes", 2, segments) for segments in (0, -1, 3, 1 << 62)],
    *[("weight_only_codes", 3, bits) for bits in (0, 8, 16)],
    *[("weight_only_codes", 4, columns) for columns in (0, -1, 1, 2, 3, 65, 1 << 62)],
    ("weight_only_codes", 5, False),
    *[("float8_scales", 1, kind) for kind in ("bfloat16", "float8_e4m3fn")],
    *[("float8_scales", 3, clamp) for clamp in (0.0, -1.0, float("nan"), None)],
    *[("float8_codes", 2, segments) for segments in (0, -5, 7)],
    ("cast", 1, "float32"),
    *[("cast", 2, to) for to in ("bfloat16", "float8_e4m3fn", "float64", "float16")],
    *[("arranged", 1, bits) for bits in (0, 4 * 8, -8)],
    *[("arranged", 2, columns) for columns in (0, 1, 3, 4)],
    ("arranged", 3, False),
    *[("smoothed_codes", 2, product) for product in ("", "Half", "float32", None)],
    *[("gguf_numbers", 1, kind) for kind in ("Q4_1", "Q4_K", "IQ2_XXS", "", None)],
    *[("gguf_numbers", 2, to) for to in ("bfloat16", "float8_e4m3fn", "float64", "", None)],
]


@pytest.mark.parametrize(("name", "place", "wrong"), WRONG_NUMBERS)
def test_a_wrong_number_is_refused(name: str, place: int, wrong: Any) -> None:
    *given, out = RIGHT[name]
    given[place] = wrong
    result = np.full_like(out, 77)
    with pytest.raises((ValueError, TypeError, OverflowError)):
        call(name, (*given, result))
    assert np.all(result == 77)


def test_a_row_that_is_no_whole_number_of_runs_is_refused() -> None:
    odd = np.ones((4, 24), dtype=np.uint16)
    for bits, columns, mixed in ((8, 1, True), (4, 1, True), (8, 2, True)):
        out = room(4 // columns, columns * 24 * bits // 8)
        with pytest.raises(ValueError, match="whole tiles"):
            call("weight_only_codes", (odd, "float16", 1, bits, columns, mixed, room(4, 1, dtype=np.float32), out))
    with pytest.raises(ValueError, match="whole"):
        call("arranged", (np.ones((4, 24), dtype=np.uint8), 8, 1, True, room(4, 24)))


def test_only_levels_that_the_processor_has_can_be_used() -> None:
    assert BUILT is not None
    assert BUILT.level() in BUILT.levels()
    for wrong in ("x86-64-v9", "", None, 4):
        with pytest.raises((ValueError, TypeError)):
            BUILT.use(wrong)


def test_too_few_and_too_many_arguments() -> None:
    for name, arguments in RIGHT.items():
        work: Callable[..., Any] = getattr(BUILT, name)
        for some in (arguments[:-1], (*arguments, 1), ()):
            with pytest.raises(TypeError):
                work(*some)
