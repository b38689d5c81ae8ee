"""FP8: torch's own conversion over every value of interest; a scale a row, by each rank's share; one scale for fused parts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import slices, whole
from stages.quantization.targets.fp8 import largest, pack_channels, pack_stack, pack_tensor, quantize_channels
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.packed_tensors import CHUNKS, opened, part
from tests.support.strategies import regions

F8, BF16, FP16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
NUMBERS = np.array([code for code in range(256) if code & 127 != 127], dtype=np.uint8)  # all but the two NaNs

each_type = pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)


def of_torch(array: np.ndarray) -> np.ndarray:
    """float8 bit patterns of float32 values, by torch."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def numbers_of(codes: np.ndarray) -> np.ndarray:
    """float32 of float8 bit patterns, by torch."""
    return torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def quantized(weight: np.ndarray, segments: int = 1, clamp: float = 1200.0, chunk: int = 1 << 20, name: str = "w") -> Any:
    """`weight` and `per_channel_scale` as lazy arrays."""
    result = quantize_channels(name, opened({"w": weight}, chunk)["w"], segments, clamp)
    return result["weight"][0], result["per_channel_scale"][0]


def naive(weight: np.ndarray, clamp: float = 1200.0) -> tuple[np.ndarray, np.ndarray]:
    """Bit patterns and scales of a matrix by the format's formula, row by row in torch."""
    codes, scales = [], []
    for row in weight.astype(np.float32):
        x = torch.clamp(torch.from_numpy(row), -clamp, clamp)
        scale = torch.clamp(x.abs().max() / 448, min=1 / (448 * 512))
        codes.append(torch.clamp(x / scale, -448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy())
        scales.append(float(scale))
    return np.array(codes), np.array(scales, dtype=np.float32)


def of_interest() -> np.ndarray:
    """Every code's value, every midpoint of two, neighbours of each in float32, and all 16-bit values, up to 448."""
    exact = np.sort(numbers_of(NUMBERS)).astype(np.float64)
    exact = np.unique(np.concatenate([exact, (exact[1:] + exact[:-1]) / 2])).astype(np.float32)
    near = [exact]
    for direction in (np.float32(-1e9), np.float32(1e9)):
        step = exact
        for _ in range(2):
            step = np.nextafter(step, direction)
            near.append(step)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    everything = np.concatenate([*near, *(patterns.view(dtype).astype(np.float32) for dtype in (FP16, BF16))])
    everything = np.concatenate([everything, np.array([1e-45, -1e-45, 1e-38, -0.0], dtype=np.float32)])
    return everything[np.isfinite(everything) & (np.abs(everything) <= 448)]


def test_conversion_is_that_of_torch() -> None:
    """A row with 448 in it has the scale 1: its values are converted as they are."""
    given_ = of_interest()
    given_ = np.concatenate([given_, np.full(-len(given_) % 127, 1, dtype=np.float32)]).reshape(-1, 127)
    rows = np.concatenate([np.full((len(given_), 1), 448, dtype=np.float32), given_], axis=1)
    codes, scales = quantized(rows)
    assert np.all(values(scales) == 1)
    assert np.array_equal(values(codes).view(np.uint8), of_torch(rows))


@each_type
@pytest.mark.parametrize("order", ["random", "by magnitude"])
def test_every_value_of_the_type_by_the_formula(dtype: np.dtype, order: str) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    if order == "random":
        numbers = np.random.default_rng(0).permutation(numbers)
    else:
        numbers = numbers[np.argsort(np.abs(numbers.astype(np.float32)), kind="stable")]
    weight = numbers[: len(numbers) // 60 * 60].reshape(-1, 60)
    codes, scales = quantized(weight)
    expected, their_scales = naive(weight)
    assert np.array_equal(values(codes).view(np.uint8), expected)
    assert values(scales)[:, 0].tobytes() == their_scales.tobytes()


def test_scales_have_a_least_and_weights_a_bound() -> None:
    weight = np.array([[0.0, -0.0], [1e-7, -1e-7], [1500, -3000], [-1200, 600]], dtype=BF16)
    codes, scales = quantized(weight)
    least, most = np.float32(1 / (448 * 512)), np.float32(1200 / 448)
    assert values(scales)[:, 0].tolist() == [least, least, most, most]
    assert numbers_of(values(codes))[2].tolist() == [448, -448]
    _, scales = quantized(weight, clamp=600.0)
    assert values(scales)[2:, 0].tolist() == [np.float32(600 / 448)] * 2


@examples(40)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_and_each_share_of_a_row_by_itself(data: st.DataObject, chunk: int, seed: int) -> None:
    """Quantizing with segments is quantizing each rank's slice, stacks of experts matrix by matrix."""
    dtype, segments = data.draw(st.sampled_from([FP16, BF16])), data.draw(st.integers(1, 3))
    stacked = data.draw(st.sampled_from([(), (1,), (3,)]))
    out, features = data.draw(st.integers(1, 6)), segments * data.draw(st.integers(1, 8))
    weight = (np.random.default_rng(seed).standard_t(2, (*stacked, out, features)) * 10.0 ** (seed % 5 - 2)).astype(dtype)
    codes, scales = quantized(weight, segments, chunk=chunk)
    found = [[naive(rank) for rank in np.split(matrix, segments, axis=1)] for matrix in weight.reshape(-1, out, features)]
    expected = np.stack([np.concatenate([rank for rank, _ in ranks], axis=1) for ranks in found]).reshape(weight.shape)
    region = data.draw(regions(expected.shape))
    assert np.array_equal(part(codes, region).view(np.uint8), expected[slices(region)])
    wanted = np.stack([np.stack([scale for _, scale in ranks], axis=1) for ranks in found]).reshape(*stacked, out, segments)
    region = data.draw(regions(wanted.shape))
    assert scales.dtype == np.float32
    assert part(scales, region).tobytes() == np.ascontiguousarray(wanted[slices(region)]).tobytes()


@each_type
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", [0, 1], ids=["codes", "scales"])
def test_a_value_that_is_no_number_is_refused_by_name(dtype: np.dtype, wrong: float, what: int) -> None:
    weight = np.ones((16, 8), dtype=dtype)
    weight[9, 7] = wrong
    with pytest.raises(BadInput, match=r"layers\.0\.w: found a value that is not finite .* expected finite weights"):
        values(quantized(weight, 2, chunk=64, name="layers.0.w")[what])


NAMES = ("q.weight", "k.weight", "v.weight")


def named(parameters: dict[str, np.ndarray], prefix: str, chunk: int = 1 << 20) -> dict[str, Any]:
    """Arrays under names of their own: two of one name would be one."""
    arrays = opened({prefix + name: array for name, array in parameters.items()}, chunk)
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def fused(scales: list[float], seed: int = 0, rows: int = 3) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Codes of the parts of a fused module, and the parts as they are unpacked."""
    codes = [np.random.default_rng(seed + n).choice(NUMBERS, (rows + n, 5)).view(F8) for n in range(len(scales))]
    parts = []
    for n, (weight, scale) in enumerate(zip(codes, scales, strict=True)):
        held = {"fp8": weight, "tensor_scale": np.array([scale], np.float32), "input_scale": np.array([0.1 + n], np.float32)}
        parts.append(named(held, str(n), 10))
    return codes, parts


@examples(30)
@given(scales=st.lists(st.floats(2**-20, 2**10, width=32), min_size=2, max_size=3), seed=st.integers(0, 99), data=st.data())
def test_parts_are_brought_to_the_largest_of_their_scales(scales: list[float], seed: int, data: st.DataObject) -> None:
    """Multiplied, divided, then converted once; the largest activation scale is everyone's."""
    codes, parts = fused(scales, seed)
    weights, shared = pack_tensor(NAMES[: len(parts)], parts)
    common = max(scales)
    for weight, own, scale in zip(weights, codes, scales, strict=True):
        wide = torch.from_numpy(own.view(np.uint8)).view(torch.float8_e4m3fn).to(torch.float32)
        expected = (wide * torch.tensor(scale) / torch.tensor(common)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        array, parameter = weight["weight"]
        region = data.draw(regions(expected.shape))
        assert np.array_equal(part(array, region).view(np.uint8), expected[slices(region)])
        assert [axis for axis, _ in parameter.axes] == ["out", "in"]
        if scale == common:
            assert part(array, whole(expected.shape)).tobytes() == own.tobytes(), "codes of the largest scale are as they were"
    assert values(shared["weights_scaling_factor"][0]).tolist() == [np.float32(common)]
    assert values(shared["activation_scaling_factor"][0]).tolist() == [np.float32(0.1 + len(scales) - 1)]


# Of the last three the order shows: to divide first, or to multiply by the quotient of the scales, gives other codes.
SCALES = [(0.3, 0.7), (1e-4, 0.9), (0.5, 1.0), (0.99999994, 1.0), (0.001, 0.022), (0.001, 0.03), (0.002, 0.088)]


def test_every_code_of_a_fused_part() -> None:
    codes = NUMBERS.view(F8).reshape(2, 127)
    others: list[bool] = []
    for scale, common in SCALES:
        parts = [
            {"fp8": codes, "tensor_scale": np.array([s], np.float32), "input_scale": np.ones(1, np.float32)}
            for s in (scale, common)
        ]
        weights, _ = pack_tensor(NAMES[:2], [named(part_, f"{n}") for n, part_ in enumerate(parts)])
        wide, own, shared = numbers_of(codes), np.float32(scale), np.float32(common)
        assert np.array_equal(values(weights[0]["weight"][0]).view(np.uint8), of_torch(wide * own / shared))
        assert values(weights[1]["weight"][0]).tobytes() == codes.tobytes()
        others.append(
            all(np.any(of_torch(wide * own / shared) != of_torch(other)) for other in (wide / shared * own, wide * (own / shared)))
        )
    assert others[-3:] == [True] * 3


def test_a_module_of_one_part_is_left_as_it_is() -> None:
    codes, parts = fused([0.25])
    weights, shared = pack_tensor(NAMES[: len(parts)], parts)
    assert weights[0]["weight"][0] is parts[0]["fp8"]
    assert values(weights[0]["weight"][0]).tobytes() == codes[0].tobytes()
    assert values(shared["weights_scaling_factor"][0]).tolist() == [0.25]
    assert values(shared["activation_scaling_factor"][0]).tobytes() == values(parts[0]["input_scale"]).tobytes()


def test_rows_keep_their_codes_and_scales() -> None:
    codes = np.random.default_rng(0).choice(NUMBERS, (6, 5)).view(F8)
    by_row = named({"fp8": codes, "channel_scale": np.arange(1, 7, dtype=np.float32)}, "a")
    result = pack_channels("w", by_row)
    assert result["weight"][0] is by_row["fp8"]
    assert values(result["per_channel_scale"][0]).tolist() == [1, 2, 3, 4, 5, 6]
    assert part(result["per_channel_scale"][0], ((2, 5),)).tolist() == [3, 4, 5]
    one = pack_channels("w", named({"fp8": codes, "tensor_scale": np.array([0.125], np.float32)}, "b"))
    assert values(one["per_channel_scale"][0]).tolist() == [0.125] * 6
    assert part(one["per_channel_scale"][0], ((2, 5),)).tolist() == [0.125] * 3


def test_the_largest_of_several() -> None:
    scales = opened({name: np.array([value], np.float32) for name, value in (("a", 0.5), ("b", 2.0), ("c", 1.0))})
    assert values(largest(list(scales.values()))).tolist() == [2.0]
    assert largest([scales["a"]]) is scales["a"]


def experts(each: list[list[float]]) -> list[list[tuple[str, Any]]]:
    """The scales of each expert's parts, with the names of these."""
    names = [[f"{e}.{n}" for n, _ in enumerate(own)] for e, own in enumerate(each)]
    return [
        [(name, opened({name: np.array([value], np.float32)})[name]) for name, value in zip(own, values_, strict=True)]
        for own, values_ in zip(names, each, strict=True)
    ]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("number", [0, 1])
def test_scales_that_are_not_finite_are_refused_by_name(wrong: float, number: int) -> None:
    said = rf"{NAMES[number]}: scales: found a scale that is not finite .*; expected finite scales\. .*--dequantize"
    for key, shared_as in (("tensor_scale", "weights_scaling_factor"), ("input_scale", "activation_scaling_factor")):
        _, parts = fused([0.25, 0.5])
        parts[number] |= named({key: np.array([wrong], np.float32)}, "wrong")
        _, shared = pack_tensor(NAMES[:2], parts)
        with pytest.raises(BadInput, match=said):
            values(shared[shared_as][0])
    scales = np.arange(1, 7, dtype=np.float32)
    scales[3] = wrong
    codes = np.zeros((6, 5), F8)
    for of_rows in ({"channel_scale": scales}, {"tensor_scale": np.array([wrong], np.float32)}):
        with pytest.raises(BadInput, match=said):
            values(pack_channels(NAMES[number], named({"fp8": codes, **of_rows}, "c"))["per_channel_scale"][0])
    with pytest.raises(BadInput, match=r"1\.0: scales: found a scale that is not finite"):
        values(pack_stack(experts([[0.5, 2.0], [wrong]]), 1)[0])


@pytest.mark.parametrize(("shares", "expected"), [(1, [8.0]), (2, [4.0, 8.0]), (4, [2.0, 4.0, 8.0, 1.0])])
def test_activations_of_a_stack_have_the_largest_scale_of_the_rank_s_experts(shares: int, expected: list[float]) -> None:
    each = [[0.5, 2.0], [4.0], [8.0, 1.0], [1.0]]
    array, known = pack_stack(experts(each), shares)
    assert values(array).tolist() == expected
    assert (array.dtype, dict(known.axes)) == (np.float32, {"expert": Fraction(shares, 4)})
    if shares > 1:
        assert part(array, ((1, shares),)).tolist() == expected[1:]
