"""The kernels in C give the bytes of their NumPy twins, at every level of instructions that this processor has: all values of the
small types, shapes that are no multiple of anything, parts of wider matrices, and values that are no numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from stages.quantization.kernels import compiled, twins
from stages.quantization.kernels.layout import TILE, KernelLayout
from tests.support.built_kernels import BUILT, at, levels, needs_module
from tests.support.examples import examples

BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
LAYOUTS = [KernelLayout(8, 2), KernelLayout(8, 1), KernelLayout(8, 1, False), KernelLayout(4, 4), KernelLayout(4, 1)]
LAYOUTS += [KernelLayout(4, 1, False)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"int{layout.bits}-{layout.columns}-{layout.mixed}")
each_half = pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)

pytestmark = needs_module


def alike(name: str, *arguments: Any) -> None:
    """A kernel at each level gives what its twin gives."""
    twin = getattr(twins, name)(*arguments)
    for level in levels():
        with at(level):
            same(getattr(compiled, name)(*arguments), twin, level, spare=name == "cast")


def same(ours: Any, twin: Any, level: str = "", *, spare: bool = False) -> None:
    """Equal bit for bit: an array, or several. The sign and the `spare` bits of NaN only where that is asked for: what a sum or a
    product makes of them depends on the processor.
    """
    if isinstance(twin, tuple):
        for one, other in zip(ours, twin, strict=True):
            same(one, other, level, spare=spare)
        return
    assert (ours.dtype, ours.shape) == (twin.dtype, twin.shape)
    if not spare and ours.dtype in (F8, BF16, FP16, FP32):
        missing = np.isnan(twin.astype(FP32))
        assert np.array_equal(np.isnan(ours.astype(FP32)), missing), level
        ours, twin = ours[~missing], twin[~missing]
    assert ours.tobytes() == twin.tobytes(), level


@cache
def patterns(dtype: np.dtype) -> np.ndarray:
    """Every value of a small type; of float32, random bits, and those around every tie of the 16-bit types."""
    if dtype != FP32:
        return np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 17, dtype=np.uint64).astype(np.uint32)
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = [high | low for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    return np.concatenate([random, *ties]).view(FP32)


@cache
def rows_of_numbers(dtype: np.dtype, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `patterns`, at most 2 ** 16 of them, in rows of all magnitudes, and in rows of like ones."""
    numbers = patterns(dtype)
    with np.errstate(invalid="ignore"):
        numbers = np.random.default_rng(1).permutation(numbers[np.isfinite(numbers.astype(FP32))])[: 1 << 16]
    rows = numbers[: len(numbers) // features // 8 * 8 * features]
    return rows.reshape(-1, features), rows[np.argsort(np.abs(rows.astype(FP32)), kind="stable")].reshape(-1, features)


@pytest.mark.parametrize("source", [F8, BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("wanted", [BF16, FP16, FP32], ids=str)
def test_every_cast_of_every_value(source: np.dtype, wanted: np.dtype) -> None:
    values = patterns(source)
    alike("cast", values, wanted)
    alike("cast", values.reshape(-1, 256)[:, 3:250], wanted)  # a part of a wider matrix
    alike("cast", values.reshape(2, 8, -1).T, wanted)
    alike("cast", np.broadcast_to(values[:40, None], (40, 7)), wanted)
    alike("cast", np.frombuffer(b"x" + values[:99].tobytes(), dtype=source, offset=1), wanted)  # not aligned
    for shape in ((), (0,), (3, 0), (0, 3)):
        alike("cast", np.zeros(shape, source), wanted)


def test_casts_of_other_types_are_numpys() -> None:
    values = np.array([[1.5, -2.0, 1e300]])
    alike("cast", values, FP16)
    alike("cast", values, BF16)
    alike("cast", np.array([1.5, -2.0, 3e38], dtype=">f4"), BF16)
    alike("cast", np.arange(9, dtype=np.int16), FP32)
    alike("cast", np.arange(9, dtype=np.float32), F8)


@each_layout
@each_half
@pytest.mark.parametrize("segments", [1, 3])
def test_every_number_as_int8_and_int4(layout: KernelLayout, dtype: np.dtype, segments: int) -> None:
    for values in rows_of_numbers(dtype, 192):
        alike("weight_only_codes", values, layout, segments, "w")
        alike("weight_only_scales", values, layout.bits, segments, "w")


@each_layout
@examples(20)
@given(data=st.data())
def test_int8_and_int4_of_any_shape(layout: KernelLayout, data: st.DataObject) -> None:
    run = TILE if layout.columns > 1 else 128 // layout.bits if layout.mixed else 2
    rows, features = layout.columns * data.draw(st.integers(1, 5)), run * data.draw(st.integers(1, 9))
    segments = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if features % n == 0]))
    dtype, seed = data.draw(st.sampled_from([FP16, BF16])), data.draw(st.integers(0, 99))
    random = np.random.default_rng(seed)
    values = np.clip(random.standard_t(2, (rows, features)) * 10.0 ** (seed % 9 - 4), -60000, 60000).astype(dtype)
    values[seed % rows] = 0
    alike("weight_only_codes", values, layout, segments, "w")
    alike("weight_only_scales", values, layout.bits, segments, "w")
    alike("arranged", random.integers(0, 256, (rows, features * layout.bits // 8), dtype=np.uint8), layout)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("clamp", [1200.0, 3.5])
def test_every_number_as_float8_by_row(dtype: np.dtype, segments: int, clamp: float) -> None:
    for values in rows_of_numbers(dtype, 33):
        alike("float8_codes", values, segments, clamp, "w")
        alike("float8_scales", values, segments, clamp, "w")


def test_every_tie_of_float8() -> None:
    """A row with 448 in it has the scale 1: its values are converted as they are."""
    numbers = patterns(F8).astype(FP32)
    numbers = np.unique(np.abs(numbers[np.isfinite(numbers)]))
    near = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2])
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(448))])
    values = np.concatenate([[np.float32(448)], near, -near]).astype(FP32)[None]
    alike("float8_codes", values, 1, 1200.0, "w")
    same(compiled.float8_codes(values, 1, 1200.0, "w")[0], values.astype(F8))


@examples(40)
@given(data=st.data())
def test_float8_codes_of_one_scale_as_codes_of_another(data: st.DataObject) -> None:
    """Too large for float8 is NaN; a value of 464 is not yet."""
    numbers = st.floats(2.0**-40, 2.0**40, width=32) | st.sampled_from([1.0, 464.0, 448.0, 0.0, float("inf"), 2.0**-140])
    scale, common = np.float32(data.draw(numbers)), np.float32(data.draw(numbers))
    codes = patterns(F8).reshape(2, -1)[:, : data.draw(st.integers(1, 128))]
    with np.errstate(all="ignore"):
        alike("float8_rescaled", codes, scale, common)
        alike("float8_rescaled", codes, scale, scale)


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_a_value_that_is_no_number_is_refused_by_name(dtype: np.dtype, wrong: float) -> None:
    values = np.ones((8, 64), dtype=dtype)
    values[5, 63] = wrong
    calls: list[tuple[str, tuple[Any, ...]]] = [("float8_codes", (2, 1200.0)), ("float8_scales", (1, 1200.0))]
    if dtype != FP32:
        calls += [("weight_only_codes", (layout, 2)) for layout in LAYOUTS] + [("weight_only_scales", (4, 2))]
    for level in levels():
        for name, arguments in calls:
            with at(level), pytest.raises(BadInput, match=r"some\.weight: found a value that is not finite"):
                getattr(compiled, name)(values, *arguments, "some.weight")


@examples(20)
@given(data=st.data())
def test_smoothed_weights_and_their_codes(data: st.DataObject) -> None:
    """All finite numbers of float16, times factors of all magnitudes; parts of wider matrices; and each product."""
    features, seed = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 99))
    random = np.random.default_rng(seed)
    finite = patterns(FP16)[np.isfinite(patterns(FP16))]
    values = random.permutation(finite)[: 16 * (features + 3)].reshape(16, -1)
    factors = np.exp(random.normal(0, 3, features))
    for part in (values[:, 3:], values[::2, :features], values[:0, 3:]):
        alike("column_magnitudes", part)
        alike("smoothed", part, factors)
        alike("smoothed_magnitudes", part, factors)
        for scale in (1.0, 127 / 65504, 0.0, float(np.exp(random.normal(0, 3)))):
            scales = np.full(len(part), scale, dtype=np.float32)
            alike("smoothed_codes", part, scales, "float")
            with np.errstate(all="ignore"):  # a product too large for float16 is infinite
                alike("smoothed_codes", part, scales, "half")
                alike("smoothed_codes", part, scales + np.float32(1e-3), "divided")


def test_every_tie_of_smoothed_codes() -> None:
    """Halves go to the nearest even; and codes are written where they are asked for."""
    values = np.arange(-260, 260, dtype=np.float32).astype(FP16)[None] / FP16.type(2)
    alike("smoothed_codes", values, np.ones(1, np.float32), "float")
    alike("smoothed_codes", values, np.ones(1, np.float32), "divided")
    for one in (compiled, twins):
        room = np.zeros((2, values.shape[1]), np.int8)
        one.smoothed_codes(values, np.ones(1, np.float32), "half", room[1:])
        assert room[1].tolist() == np.clip(np.rint(values[0].astype(FP32)), -127, 127).tolist()
        assert not room[0].any()


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf, 60000.0])
def test_smoothed_magnitudes_show_what_float16_does_not_hold(wrong: float) -> None:
    values = np.ones((3, 40), dtype=FP16)
    values[1, 17] = wrong
    for level in levels():
        with at(level):
            for most in (
                compiled.smoothed_magnitudes(values, np.full(40, 2.0)),
                compiled.smoothed(values, np.full(40, 2.0))[1],
                twins.smoothed_magnitudes(values, np.full(40, 2.0)),
            ):
                assert (most >= 0x7C00).tolist() == [False, True, False]


@each_layout
def test_every_code_at_every_place(layout: KernelLayout) -> None:
    alike("arranged", np.stack([np.roll(np.arange(256, dtype=np.uint8), 16 * n + n) for n in range(64)]), layout)


@examples(40)
@given(data=st.data())
def test_words_packed_along_columns(data: st.DataObject) -> None:
    rows, columns = 2 * data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    words = np.random.default_rng(rows).integers(0, 1 << 32, (rows, columns + 5), dtype=np.uint64).astype(np.uint32)
    for part in (words, words[:, 2 : columns + 2], words[:, :1], words.view(np.int32)[: rows // 4 * 2 + 2]):
        alike("transposed", part)
        alike("awq_codes", part)
    alike("transposed", words[::3])


def test_every_type_of_ggufs_blocks() -> None:
    """Of random bytes, whose scales are of all magnitudes; scales that are no numbers make the same values ones."""
    assert BUILT is not None
    random = np.random.default_rng(0)
    for kind, (size, elements) in BUILT.gguf_types().items():
        assert (elements, size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        packed = random.integers(0, 256, (64, 16, 8 * size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            alike("gguf_numbers", packed, kind)
            for dtype in (BF16, FP16):
                alike("gguf_numbers", packed[:, :5], kind, dtype)
                same(compiled.gguf_numbers(packed, kind, dtype), compiled.cast(compiled.gguf_numbers(packed, kind), dtype))
            alike("gguf_numbers", packed[:, 3:4, size : 4 * size], kind)
    for dtype in (FP32, BF16):
        alike("gguf_numbers", random.integers(0, 64, (4, 3 * 66), dtype=np.uint8), "IQ2_XXS", dtype)


def test_each_level_is_a_level_of_its_own() -> None:
    assert len(levels()) == len(set(levels())) >= 1
    for level in levels():
        with at(level) as module:
            assert module.level() == level
