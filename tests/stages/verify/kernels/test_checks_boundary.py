"""What the module of verification's kernels is given: a wrong array or number is an exception, whatever it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.verify.kernel_orders import run_places
from tests.stages.quantization.kernels.test_boundary import wrong_arrays
from tests.support.built_kernels import BUILT, BUILT_CHECKS, needs_module

pytestmark = needs_module

FLOATS = np.ones((8, 4), dtype=np.float32)
WORDS = np.ones((4, 6), dtype=np.uint32)
PLACES = np.arange(32, dtype=np.uint8)
# Of four rows of 256 in-features of a unit each, and two groups; the source's are codes of 4 bits.
COMPARED: dict[str, Any] = {
    "kind": "integers",
    "bits": 4,
    "columns": 4,
    "features": 256,
    "first": 0,
    "units": np.zeros((2, 512), dtype=np.uint8),
    "places": PLACES,
    "scales": FLOATS,
    "zeros": FLOATS,
    "type": "codes4",
    "values": np.zeros((8, 128), dtype=np.uint8),
    "value scales": FLOATS,
    "value zeros": FLOATS,
    "base": "product",
    "largest": "",
    "slope": 1.0,
    "factor": 0.0,
    "top": 0.0,
    "slack": 1.0,
    "constant": np.full((8, 4), 100, dtype=np.float32),
    "worst": 0.0,
}
ARRAYS = [name for name, value in COMPARED.items() if isinstance(value, np.ndarray)]


def compared(**changed: Any) -> Any:
    assert BUILT_CHECKS is not None
    return BUILT_CHECKS.compared(*{**COMPARED, **{name.replace("_", " "): value for name, value in changed.items()}}.values())


def test_what_is_right_is_done() -> None:
    assert compared() is not None
    assert compared(scales=FLOATS[:1].copy(), value_scales=FLOATS[:1].copy()) is not None
    assert compared(zeros=None, value_zeros=None, base="actual") is not None


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_array_is_refused(name: str) -> None:
    right = np.atleast_2d(COMPARED[name])
    for kind, wrong in wrong_arrays(right).items():
        optional = kind == "nothing" and name in ("value scales", "value zeros")
        one = kind == "flat" and name == "places"  # as it is
        less = name == "units" and kind == "one row more"
        if optional or one or less or (name == "places" and kind in ("backwards", "of equal rows")):
            continue
        with pytest.raises((ValueError, TypeError, BufferError)):
            pytest.fail(f"{kind}: {compared(**{name: wrong})}")


WRONG = [
    *[("kind", kind) for kind in ("", "integer", "pairs", "float8", None)],
    *[("bits", bits) for bits in (0, 8, -4, 1 << 40)],
    *[("columns", columns) for columns in (0, -1, 2, 8, 65, 1 << 62)],
    *[("features", features) for features in (0, -256, 128, 255, 512, 1 << 62)],
    *[("first", first) for first in (-1, 1, 8, 1 << 62)],
    *[("type", kind) for kind in ("", "codes8", "bfloat16", "float64", None)],
    *[("base", base) for base in ("", "expectedly", None)],
    *[("largest", largest) for largest in ("rows", None)],
    ("top", 1.0),
    ("places", np.full(32, 32, dtype=np.uint8)),
    ("places", None),
    ("value scales", None),
    ("zeros", None),
    ("scales", np.ones((8, 3), dtype=np.float32)),
    ("scales", np.ones((8, 32), dtype=np.float32)),
    ("constant", np.ones((8, 2), dtype=np.float32)),
    ("slope", None),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_argument_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        compared(**{name: wrong})


def test_groups_that_do_not_end_with_a_chunk_have_no_largest_value() -> None:
    wide = 3 * 1024
    more = {"features": wide, "units": np.zeros((2, 2 * wide), np.uint8), "values": np.zeros((8, wide // 2), np.uint8)}
    three = np.ones((8, 1), np.float32)
    factors = {"scales": three, "zeros": three, "value_scales": three, "value_zeros": three, "base": "expected"}
    assert compared(**more, **factors, constant=100 * three, largest="group") is not None
    with pytest.raises(ValueError, match="bound"):
        compared(**more, **factors, constant=np.ones((8, 2), np.float32), largest="group")


# Of the same rows: codes of zeros, eight in-features a word.
FACTORS = np.ones((2, 8), dtype=np.float32)
KEPT: dict[str, Any] = {
    "columns": 4,
    "features": 256,
    "first": 0,
    "units": np.zeros((2, 512), dtype=np.uint8),
    "places": run_places(4),
    "words": np.zeros((32, 8), dtype=np.uint32),
    "order": None,
    "start": 0,
    "skip": 0,
    "scales": FACTORS,
    "zeros": FACTORS * 8,
    "source scales": FACTORS,
    "source zeros": FACTORS * 0,
    "constant": FACTORS,
    "slope": 1.0,
    "worst": 0.0,
}
KEPT_ARRAYS = [name for name, value in KEPT.items() if isinstance(value, np.ndarray)]
EIGHT = PLACES[:8].copy()


def kept(**changed: Any) -> Any:
    assert BUILT_CHECKS is not None
    return BUILT_CHECKS.kept(*{**KEPT, **{name.replace("_", " "): value for name, value in changed.items()}}.values())


def test_kept_codes_that_are_right_are_done() -> None:
    assert kept() is not None
    assert kept(places=PLACES) is None, "of an order that the kernel does not know"
    assert kept(start=32, words=KEPT["words"][:28]) is not None
    assert kept(zeros=None, source_zeros=FACTORS * 8) is not None
    assert kept(source_scales=FACTORS[:1].copy(), source_zeros=FACTORS[:1] * 0) is not None
    assert kept(order=EIGHT, words=np.zeros((256, 1), np.uint32)) is not None
    less = {name: KEPT[name][:, :6].copy() for name in KEPT_ARRAYS[3:]}
    assert kept(order=EIGHT, words=np.zeros((256, 2), np.uint32), skip=5, first=2, **less) is not None


@pytest.mark.parametrize("name", KEPT_ARRAYS)
def test_a_wrong_array_of_kept_codes_is_refused(name: str) -> None:
    for kind, wrong in wrong_arrays(np.atleast_2d(KEPT[name])).items():
        optional = kind == "nothing" and name == "zeros"
        flat = kind == "flat" and name == "places"  # as it is
        more = name == "units" and kind == "one row more"
        if optional or flat or more or (name == "places" and kind in ("backwards", "of equal rows")):
            continue
        with pytest.raises((ValueError, TypeError, BufferError)):
            pytest.fail(f"{kind}: {kept(**{name: wrong})}")


WRONG_KEPT = [
    *[("columns", columns) for columns in (0, -1, 2, 8, 65, 1 << 62)],
    *[("features", features) for features in (0, -256, 128, 255, 288, 512, 1 << 62)],
    *[("first", first) for first in (-1, 1, 8, 1 << 62)],
    *[("start", start) for start in (-32, 8, 32, 256, 1 << 62)],
    *[("skip", skip) for skip in (-1, 1, 8, 1 << 62)],
    *[("order", order) for order in (EIGHT, EIGHT[1:].copy(), EIGHT + np.uint8(1))],
    *[("words", np.zeros(shape, np.uint32)) for shape in ((33, 8), (30, 8), (32, 9), (32, 1), (0, 8), (256, 1))],
    ("places", np.full(32, 32, dtype=np.uint8)),
    ("places", None),
    *[(name, np.ones(shape, np.float32)) for name in KEPT_ARRAYS[3:] for shape in ((3, 8), (2, 7), (16, 8), (0, 8), (1, 8))],
    ("slope", None),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG_KEPT, ids=lambda value: str(value)[:20])
def test_a_wrong_argument_of_kept_codes_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        kept(**{name: wrong})


@pytest.mark.parametrize(
    "more", [{"words": np.zeros((256, 2), np.uint32)}, {"skip": 1}, {"skip": 8}, {"order": EIGHT + np.uint8(1)}]
)
def test_words_of_eight_rows_of_another_shape_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"words|order"):
        kept(**{"order": EIGHT, "words": np.zeros((256, 1), np.uint32), **more})


@pytest.mark.parametrize("name", ["words_as_rows", "columns_as_rows"])
def test_words_of_another_shape_are_refused(name: str) -> None:
    assert BUILT_CHECKS is not None
    work, rows = getattr(BUILT_CHECKS, name), name == "columns_as_rows"
    more, out = ((PLACES[:8].copy(),), np.zeros((48, 2), np.uint8)) if rows else ((), np.zeros((6, 4), np.uint32))
    assert work(WORDS, *more, out) is None
    for place, right in ((0, WORDS), (1, out)):
        for kind, wrong in wrong_arrays(right).items():
            arguments = [WORDS, *more, out]
            arguments[-1 if place else 0] = wrong
            with pytest.raises((ValueError, TypeError, BufferError)):
                pytest.fail(f"{kind}: {work(*arguments)}")
    if rows:
        for places in (PLACES[:7].copy(), PLACES[:9].copy(), PLACES[1:9].copy(), None):
            with pytest.raises((ValueError, TypeError)):
                work(WORDS, places, out)


def test_levels_are_those_of_the_other_kernels() -> None:
    assert BUILT is not None
    assert BUILT_CHECKS is not None
    assert BUILT_CHECKS.levels() == BUILT.levels()
    assert BUILT_CHECKS.level() == BUILT.level()
    with pytest.raises(ValueError, match="level"):
        BUILT_CHECKS.use("x86-64-v9")


def test_bytes_of_two_shapes_are_not_compared() -> None:
    assert BUILT_CHECKS is not None
    one = np.zeros((4, 8), np.uint8)
    for other in (one[1:].copy(), one[:, 1:].copy(), None, one.astype(np.uint16)):
        with pytest.raises((ValueError, TypeError)):
            BUILT_CHECKS.same_bytes(one, other)
    assert BUILT_CHECKS.same_bytes(one[:0].copy(), one[:0].copy())
