"""Codes with scales by groups, as targets have them: GPTQ's in the kernel's order, AWQ's in ModelOpt's portable form."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import slices
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.sources import modelopt_awq
from stages.quantization.targets.groupwise import cast, held, pack_awq, pack_gptq
from tests.support.examples import examples
from tests.support.kernel_oracle import A, P, T, arrange
from tests.support.lazy import block, values
from tests.support.packed_tensors import CHUNKS, expected_codes, modelopt, opened, part, random_codes, random_scales
from tests.support.strategies import regions

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
TORCH = {BF16: torch.bfloat16, FP16: torch.float16}

each_type = pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)


def in_torch(array: np.ndarray, dtype: np.dtype) -> torch.Tensor:
    """Values in a 16-bit type, rounded by torch."""
    return torch.from_numpy(array.astype(np.float32)).to(TORCH[dtype])


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.int16).numpy().tobytes()


def packed(
    codes: np.ndarray, offsets: np.ndarray, scales: np.ndarray, layout: KernelLayout, dtype: np.dtype, chunk: int = 1 << 20
) -> dict[str, Any]:
    bits = layout.bits
    stream = expected_codes(codes.reshape(-1, codes.shape[-1]), bits).reshape(*codes.shape[:-1], -1)
    parameters = opened({f"codes{bits}": stream, "scales": scales, "offsets": offsets.astype(np.int16)}, chunk)
    return pack_gptq(parameters, layout, dtype, "float16", 64, source="weight")


@pytest.mark.parametrize(("bits", "name"), [(8, A), (8, P), (8, T), (4, A), (4, P), (4, T)])
@examples(20)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_of_a_weight_in_the_kernels_order(bits: int, name: str, data: st.DataObject, chunk: int, seed: int) -> None:
    out, features, groups = data.draw(st.sampled_from([(16, 128, 2), (64, 64, 1), (24, 192, 3)]))
    layout = KernelLayout(bits, 16 // bits if name == A else 1, name != T)
    codes, scales = random_codes((out, features), bits, seed), random_scales((groups, out), seed)
    offsets = np.random.default_rng(seed).integers(-8, 8, (groups, out))
    result = packed(codes, offsets, scales, layout, FP16, chunk)
    assert list(result) == ["weight", "weights_scaling_factor", "zero"]
    expected = np.frombuffer(arrange(codes - (1 << (bits - 1)), bits, name), dtype=np.uint8).reshape(out // layout.columns, -1)
    array, parameter = result["weight"]
    region = data.draw(regions(expected.shape))
    assert array.shape == expected.shape
    assert np.array_equal(part(array, region), expected[slices(region)])
    # By its axes a feature's share of the buffer; in the file it passes for a matrix of the model's type.
    sizes = {"out": out, "in": features, "group": features}
    assert tuple(sizes[axis] * unit for axis, unit in parameter.axes) == expected.shape
    assert tuple(sizes[axis] * unit for axis, unit in parameter.header) == (features, out * bits // 16)
    assert parameter.dtype == "float16"
    for key in ("weights_scaling_factor", "zero"):
        array, parameter = result[key]
        assert array.shape == tuple(sizes[axis] * unit for axis, unit in parameter.axes) == (groups, out)
        region = data.draw(regions(array.shape))
        factors = scales if key == "weights_scaling_factor" else (offsets * scales.astype(np.float64)).astype(np.float16)
        assert part(array, region).tobytes() == np.ascontiguousarray(factors[slices(region)]).tobytes()


def test_a_stack_of_experts_is_arranged_matrix_by_matrix() -> None:
    codes, scales = random_codes((3, 16, 64), 4, 0), random_scales((3, 2, 16), 0)
    result = packed(codes, np.zeros(scales.shape), scales, KernelLayout(4, 4), FP16)
    weight = values(result["weight"][0])
    assert weight.shape == (3, 4, 128)
    assert weight.tobytes() == b"".join(arrange(matrix - 8, 4, A) for matrix in codes)


@each_type
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_offset_times_scale_rounded_once(dtype: np.dtype, bits: int) -> None:
    """Both in the model's type, as torch multiplies them: every offset with scales of all magnitudes."""
    middle = 1 << (bits - 1)
    steps = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    steps = steps[np.isfinite(steps)][: 64512 // 8 * 8].reshape(8, -1)
    points = np.random.default_rng(0).integers(-middle, middle + 1, steps.shape)
    points[0, : 2 * middle + 1] = np.arange(-middle, middle + 1)
    points[np.abs(steps.astype(np.float64) * points) >= 65520] = 1  # the type of the products must hold them
    # Offsets come as int16 in the source's order of groups; a weight of any codes belongs to them.
    codes = np.zeros((steps.shape[1], 64), dtype=int)
    result = packed(codes, points, steps, KernelLayout(bits, 16 // bits), dtype)
    expected = torch.from_numpy(points).to(TORCH[dtype]) * in_torch(steps, dtype)
    assert values(result["zero"][0]).tobytes() == bits_of(expected)
    assert values(result["weights_scaling_factor"][0]).tobytes() == bits_of(in_torch(steps, dtype))


@each_type
def test_the_zero_of_a_symmetric_source_is_nothing_but_zeros(dtype: np.dtype) -> None:
    scales = random_scales((2, 16), 0)
    zero = values(packed(random_codes((16, 64), 4, 0), np.zeros((2, 16)), scales, KernelLayout(4, 4), dtype)["zero"][0])
    assert zero.dtype == dtype
    assert zero.tobytes() == bytes(2 * zero.size)


def test_a_scale_too_large_for_float16_is_infinite_as_in_torch() -> None:
    steps = np.array([[65504, 65519.99, 65520, 1e6, -1e6, 1e-8, 2**-24, 2**-25, np.nextafter(np.float32(2**-25), np.float32(1))]])
    ours = cast(((0, 1), (0, 9)), block(steps.astype(np.float32)), FP16)
    assert ours.tobytes() == bits_of(in_torch(steps, FP16))


@pytest.mark.parametrize(
    ("scale", "to", "largest", "said"),
    [
        (1e5, FP16, 15, "a scale of 1e+05, which float16 has as inf"),
        (2e-8, FP16, 15, "a scale of 2e-08, which float16 has as 0"),
        (-2e-8, FP16, 127, "a scale of -2e-08, which float16 has as -0"),
        (3e-38 / 2**10, FP16, np.inf, "which float16 has as 0"),
        (3.4028e38, BF16, 15, "which bfloat16 has as inf"),
        (1e5, BF16, 15, ""),
        (2e-8, BF16, 15, ""),
        (65504, FP16, 15, ""),
        (0, FP16, 15, ""),
        (1e-12, FP16, 255, ""),  # of a row of zeros: no code of it is a number in float16
    ],
)
def test_a_scale_that_the_type_does_not_hold_is_refused(scale: float, to: np.dtype, largest: float, said: str) -> None:
    values_ = np.array([[1, scale, 0.5]], np.float32)
    if not said:
        assert held(values_, to, "a.qweight", largest).tobytes() == bits_of(in_torch(values_, to))
        return
    with pytest.raises(BadInput, match=re.escape(said)) as refused:
        held(values_, to, "a.qweight", largest)
    assert refused.value.problems[0].subject == "a.qweight: scales"


@pytest.mark.parametrize("key", ["weights_scaling_factor", "zero"])
@pytest.mark.parametrize(("step", "point"), [(1e5, 0), (2e-8, 0), (6e4, 3)])
def test_packed_scales_are_looked_at(key: str, step: float, point: int) -> None:
    scales = np.full((2, 16), 0.5, np.float32)
    scales[1, 3] = step
    result = packed(random_codes((16, 64), 4, 0), np.full((2, 16), point), scales, KernelLayout(4, 4), FP16)[key][0]
    if (key, point) == ("weights_scaling_factor", 3):
        assert np.isfinite(values(result)).all()
        return
    with pytest.raises(BadInput, match="weight: scales"):
        values(result)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, FP16])
def test_scales_that_are_not_finite_are_refused_in_any_type(wrong: float, dtype: np.dtype) -> None:
    """In the target's own type, too, which they would pass to as they are."""
    scales = np.full((2, 16), 0.5, dtype)
    scales[1, 3] = wrong
    said = r"weight: scales: found a scale that is not finite .*; expected finite scales\. .*--dequantize"
    both = packed(random_codes((16, 64), 4, 0), np.full((2, 16), 0), scales, KernelLayout(4, 4), FP16)
    for key in ("weights_scaling_factor", "zero"):
        with pytest.raises(BadInput, match=said):
            values(both[key][0])
    given_ = {"codes4": np.zeros((16, 16), np.uint8), "scales": scales, "offsets": np.zeros(scales.shape, np.int16)}
    with pytest.raises(BadInput, match=said):
        values(pack_awq(opened(given_), FP16, "weight")["weights_scaling_factor"][0])


def test_factors_of_activations_are_looked_at() -> None:
    source = modelopt(random_codes((16, 32), 4, 0), random_scales((2, 16), 0, np.float32))
    unpacked = modelopt_awq.FORMAT.unpack(opened(source, 40), {})
    unpacked |= opened({"prequant": np.array([1e-10] * 32, np.float32)}, 1 << 20)
    with pytest.raises(BadInput, match="weight: scales"):
        values(pack_awq(unpacked, FP16, "weight")["prequant_scaling_factor"][0])


@each_type
@examples(30)
@given(data=st.data(), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99), smooth=st.booleans())
def test_awq_is_what_modelopt_packs(dtype: np.dtype, data: st.DataObject, chunk: int, seed: int, smooth: bool) -> None:
    out, features = 2 * data.draw(st.integers(1, 6)), 4 * data.draw(st.integers(1, 6))
    groups = data.draw(st.sampled_from([1, 2]))
    codes, scales = random_codes((out, features), 4, seed), random_scales((groups, out), seed, np.float16)
    factors = np.random.default_rng(seed).uniform(0.1, 3, features).astype(np.float32)
    given_ = {"codes4": expected_codes(codes, 4), "scales": scales, "offsets": np.zeros(scales.shape, np.int16)}
    result = pack_awq(opened(given_ | ({"prequant": factors} if smooth else {}), chunk), dtype)
    assert list(result) == ["weight", "weights_scaling_factor", "prequant_scaling_factor"]
    theirs = modelopt(codes, scales.astype(np.float32))
    wanted = {
        "weight": theirs["weight"].view(np.int8),
        "weights_scaling_factor": theirs["weight_scale"],
        "prequant_scaling_factor": factors if smooth else np.ones(features),
    }
    sizes = {"out": out, "in": features, "group": features}
    for key, expected in wanted.items():
        array, parameter = result[key]
        assert array.shape == tuple(sizes[axis] * unit for axis, unit in parameter.axes) == expected.shape
        region = data.draw(regions(expected.shape))
        found = part(array, region)
        if key == "prequant_scaling_factor":
            assert found.tobytes() == bits_of(in_torch(np.ascontiguousarray(expected[slices(region)]), dtype))
        else:
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected[slices(region)]), key


def test_awq_unpacked_and_packed_again_is_the_same() -> None:
    source = modelopt(random_codes((16, 32), 4, 0), random_scales((2, 16), 0, np.float32))
    result = pack_awq(modelopt_awq.FORMAT.unpack(opened(source, 40), {}), FP16)
    assert values(result["weight"][0]).tobytes() == source["weight"].tobytes()
    assert values(result["weights_scaling_factor"][0]).tobytes() == source["weight_scale"].tobytes()
