"""int8 and int4 weight-only: the formula of the format, row by row in exact arithmetic, over every 16-bit value; ranks' shares of a
row by themselves; values that are no numbers refused.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import slices
from stages.quantization.kernels import chosen, weight_only
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.kernels.weight_only import _HALF
from stages.quantization.kernels.weight_only import weight_only_scales as row_scales
from stages.quantization.targets.weight_only import pack
from tests.support.examples import examples
from tests.support.kernel_oracle import A, P, T, arrange
from tests.support.lazy import values
from tests.support.packed_tensors import CHUNKS, opened, part
from tests.support.strategies import regions

BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)

each_type = pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
each_width = pytest.mark.parametrize("bits", [8, 4])


def quantize(given_: np.ndarray, bits: int, segments: int, name: str) -> np.ndarray:
    """Unsigned codes with the scales that the values themselves have."""
    return weight_only.quantize(given_, bits, row_scales(given_, bits, segments, name))


def naive(row: np.ndarray, bits: int) -> tuple[list[int], np.float32]:
    """Signed codes and the scale of one row: one division in float32, halves away from zero, then clamped."""
    top = 1 << (bits - 1)
    scale = np.float32(max(abs(float(value)) for value in row) / top)
    if scale == 0:
        return [0] * len(row), scale
    codes = []
    for value in row:
        quotient = float(np.float32(value) / scale)
        away = math.copysign(math.floor(abs(quotient) + 0.5), quotient)
        codes.append(int(min(max(away, -top), top - 1)))
    return codes, scale


def rounded(scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 in the model's type, to nearest even, by torch."""
    kind = torch.float16 if dtype == FP16 else torch.bfloat16
    return torch.from_numpy(scales).to(kind).view(torch.int16).numpy().view(dtype)


def same(given_: np.ndarray, bits: int) -> None:
    """Codes and scales of a matrix are the naive ones."""
    codes = quantize(given_, bits, 1, "w").astype(int) - (1 << (bits - 1))
    scales = row_scales(given_, bits, 1, "w")
    for row, ours, scale in zip(given_, codes, scales, strict=True):
        theirs, their_scale = naive(row, bits)
        assert ours.tolist() == theirs
        assert scale[0] == their_scale


def finite(dtype: np.dtype) -> np.ndarray:
    """Every number of a 16-bit type."""
    everything = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    return everything[np.isfinite(everything.astype(np.float32))]


@each_width
@each_type
@pytest.mark.parametrize("order", ["random", "by magnitude"])
def test_every_value_of_the_type(bits: int, dtype: np.dtype, order: str) -> None:
    """In rows of all magnitudes, and in rows of like ones, where the quotients are large."""
    numbers = finite(dtype)
    if order == "random":
        numbers = np.random.default_rng(bits).permutation(numbers)
    else:
        numbers = numbers[np.argsort(np.abs(numbers.astype(np.float32)), kind="stable")]
    same(numbers[: len(numbers) // 60 * 60].reshape(-1, 60), bits)


@each_width
@each_type
def test_every_value_as_the_largest_of_its_row(bits: int, dtype: np.dtype) -> None:
    """The scale is exact, denormals included, and is rounded once as it is stored; the largest saturates where it is positive."""
    largest = finite(dtype)
    top = 1 << (bits - 1)
    scales = row_scales(largest[:, None], bits, 1, "w")
    assert np.array_equal(scales[:, 0].astype(np.float64), np.abs(largest.astype(np.float64)) / top)
    codes = quantize(largest[:, None], bits, 1, "w")[:, 0].astype(int) - top
    signs = np.sign(largest.astype(np.float32))
    assert np.array_equal(codes, np.where(signs > 0, top - 1, np.where(signs < 0, -top, 0)))
    written = values(packed(largest[:, None], dtype, KernelLayout(bits, 1), rows=1 << 16)[1])
    assert written.dtype == dtype
    assert written[:, 0].tobytes() == rounded(scales[:, 0], dtype).tobytes()


def packed(
    weight: np.ndarray, dtype: np.dtype, layout: KernelLayout, segments: int = 1, chunk: int = 1 << 20, rows: int = 64
) -> Any:
    """`weight` and `per_channel_scale` as lazy arrays."""
    result = pack("w", opened({"w": weight}, chunk)["w"], layout, segments, str(dtype), rows)
    return result["weight"][0], result["per_channel_scale"][0]


@each_width
@each_type
def test_ties_go_away_from_zero(bits: int, dtype: np.dtype) -> None:
    top = 1 << (bits - 1)
    halves = np.arange(-2 * top, 2 * top + 1) / 2
    codes = quantize(np.concatenate([halves, [-top]]).astype(dtype)[None], bits, 1, "w")[0, :-1].astype(int) - top
    expected = [min(int(math.copysign(math.floor(abs(half) + 0.5), half)), top - 1) for half in halves]
    assert codes.tolist() == expected
    assert dict(zip(halves, codes, strict=True))[0.5] == 1
    assert dict(zip(halves, codes, strict=True))[-0.5] == -1
    assert dict(zip(halves, codes, strict=True))[top - 0.5] == top - 1


def test_what_is_added_before_truncation_rounds_like_c() -> None:
    """Around every half that a quotient can be near, neighbours in float32 included: 0.49999997 is not rounded up."""
    halves = np.arange(0, 129, dtype=np.float32) + np.float32(0.5)
    near = [halves]
    for direction in (np.float32(0), np.float32(1000)):
        step = halves
        for _ in range(3):
            step = np.nextafter(step, direction)
            near.append(step)
    quotients = np.concatenate([*near, np.arange(129, dtype=np.float32), np.array([0.49999997, 1e-45, 1e-30], dtype=np.float32)])
    quotients = np.concatenate([quotients, -quotients])
    ours = (quotients + np.copysign(_HALF, quotients)).astype(np.int32)
    assert ours.tolist() == [int(math.copysign(math.floor(abs(float(q)) + 0.5), q)) for q in quotients]
    assert np.float32(0.49999997) + _HALF < 1 <= np.float32(0.5) + _HALF


@each_width
@each_type
def test_rows_of_zeros(bits: int, dtype: np.dtype) -> None:
    weight = np.zeros((3, 8), dtype=dtype)
    weight[1] = -weight[1]
    weight[2, 3] = -1
    codes = quantize(weight, bits, 1, "w").astype(int) - (1 << (bits - 1))
    assert codes[:2].tolist() == [[0] * 8] * 2
    assert row_scales(weight, bits, 1, "w")[:, 0].tolist() == [0.0, 0.0, 2.0 ** -(bits - 1)]
    codes = quantize(weight[:, :4], bits, 2, "w").astype(int) - (1 << (bits - 1))
    assert codes[2].tolist() == [0, 0, 0, -(1 << (bits - 1))]


@each_width
@each_type
@examples(30)
@given(rows=st.integers(1, 6), share=st.integers(1, 9), segments=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_share_of_a_row_is_quantized_by_itself(
    bits: int, dtype: np.dtype, rows: int, share: int, segments: int, seed: int
) -> None:
    """Quantizing with segments is quantizing each rank's slice."""
    weight = np.random.default_rng(seed).standard_t(2, (rows, share * segments)).astype(dtype)
    ranks = np.split(weight, segments, axis=1)
    codes = np.concatenate([quantize(np.ascontiguousarray(rank), bits, 1, "w") for rank in ranks], axis=1)
    scales = np.concatenate([row_scales(np.ascontiguousarray(rank), bits, 1, "w") for rank in ranks], axis=1)
    assert np.array_equal(quantize(weight, bits, segments, "w"), codes)
    assert np.array_equal(row_scales(weight, bits, segments, "w"), scales)
    for rank in ranks:
        same(rank, bits)


@pytest.mark.parametrize(("bits", "name"), [(8, A), (8, P), (8, T), (4, A), (4, P), (4, T)])
@examples(15)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_of_what_is_packed(bits: int, name: str, data: st.DataObject, chunk: int, seed: int) -> None:
    dtype = data.draw(st.sampled_from([FP16, BF16]))
    segments = data.draw(st.sampled_from([1, 2]))
    stacked = data.draw(st.sampled_from([(), (1,), (3,)]))
    out, features = data.draw(st.sampled_from([(16, 128), (64, 256), (8, 384)]))
    layout = KernelLayout(bits, 16 // bits if name == A else 1, name != T)
    weight = np.random.default_rng(seed).standard_t(3, (*stacked, out, features)).astype(dtype)
    codes, scales = packed(weight, dtype, layout, segments, chunk)

    matrices = weight.reshape(-1, out, features)
    pieces = [[naive_matrix(rank, bits) for rank in np.split(matrix, segments, axis=1)] for matrix in matrices]
    signed = [np.concatenate([quantized for quantized, _ in parts], axis=1) for parts in pieces]
    expected = np.frombuffer(b"".join(arrange(matrix, bits, name) for matrix in signed), dtype=np.uint8)
    expected = expected.reshape(*stacked, out // layout.columns, -1)
    region = data.draw(regions(expected.shape))
    assert codes.shape == expected.shape
    assert np.array_equal(part(codes, region), expected[slices(region)])

    wanted = np.stack([np.stack([scale for _, scale in parts], axis=1) for parts in pieces]).reshape(*stacked, out, segments)
    wanted = rounded(wanted, dtype)
    region = data.draw(regions(wanted.shape))
    assert scales.dtype == dtype
    assert part(scales, region).tobytes() == np.ascontiguousarray(wanted[slices(region)]).tobytes()


@pytest.mark.parametrize("cached", [1, 300, 64 * 40])
@pytest.mark.parametrize(("bits", "name"), [(8, A), (8, P), (8, T), (4, A), (4, P), (4, T)])
def test_how_many_rows_are_on_their_way_does_not_matter(bits: int, name: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_t(3, (72, 64)).astype(FP16)
    monkeypatch.setattr(weight_only, "_CACHED", cached)
    monkeypatch.setenv(chosen.VARIABLE, chosen.NUMPY)
    codes, _ = packed(weight, FP16, KernelLayout(bits, 16 // bits if name == A else 1, name != T))
    assert values(codes).tobytes() == arrange(naive_matrix(weight, bits)[0], bits, name)


def naive_matrix(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [n, K] and scales float32 [n]."""
    found = [naive(row, bits) for row in weight]
    return np.array([codes for codes, _ in found]), np.array([scale for _, scale in found], dtype=np.float32)


@each_width
@each_type
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", [0, 1], ids=["codes", "scales"])
def test_a_value_that_is_no_number_is_refused_by_name(bits: int, dtype: np.dtype, wrong: float, what: int) -> None:
    weight = np.ones((16, 64), dtype=dtype)
    weight[9, 63] = wrong
    array = pack("model.layers.0.mlp.up_proj.weight", opened({"w": weight}, 512)["w"], KernelLayout(bits, 1), 2, str(dtype), 4)
    with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.up_proj\.weight: found a value that is not finite") as caught:
        values(list(array.values())[what][0])
    assert "finite weights" in str(caught.value)


@each_width
def test_the_error_is_half_a_step_but_for_what_saturates(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(FP16)
    scales = row_scales(weight, bits, 1, "w")
    codes = quantize(weight, bits, 1, "w").astype(np.float32) - np.float32(1 << (bits - 1))
    error = np.abs(codes * scales - weight.astype(np.float32)) / scales
    saturated = weight.astype(np.float32) / scales > (1 << (bits - 1)) - 1
    assert error[~saturated].max() <= 0.5 + 1e-4
    assert error[saturated].max() <= 1
