"""Numbers in W4A16_AWQ: any part of them, what values no step holds, and shapes by their axes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import slices
from stages.quantization.targets.awq_numbers import pack
from tests.support.examples import examples
from tests.support.lazy import values
from tests.support.packed_tensors import opened, part
from tests.support.strategies import regions

BF16, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


def weight_and_scale(out: int, features: int, seed: int, kind: np.dtype) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weight = random.normal(0, 0.02, (out, features)).astype(kind)
    weight[:, :64] = 0  # a group without a step
    return {"w": weight, "s": np.exp(random.normal(0, 1, features)).astype(np.float32)}


@examples(25)
@given(
    data=st.data(),
    chunk=st.sampled_from([40, 150, 1 << 20]),
    seed=st.integers(0, 99),
    size=st.sampled_from([64, 128]),
    kind=st.sampled_from([FP16, BF16, np.dtype(np.float32)]),
    rows=st.sampled_from([2, 6, 64]),
)
def test_any_part_is_that_of_the_whole(data: st.DataObject, chunk: int, seed: int, size: int, kind: np.dtype, rows: int) -> None:
    out, features = data.draw(st.sampled_from([(16, 128), (6, 256), (64, 384)]))
    arrays = opened(weight_and_scale(out, features, seed, kind), chunk)
    result = pack("w", arrays["w"], arrays["s"], size, FP16, rows)
    sizes = {"out": out, "in": features, "group": features}
    for name, dtype in (("weight", np.int8), ("weights_scaling_factor", np.float32), ("prequant_scaling_factor", FP16)):
        array, parameter = result[name]
        assert array.dtype == dtype
        assert array.shape == tuple(sizes[axis] * unit for axis, unit in parameter.axes)
        region = data.draw(regions(array.shape))
        assert np.array_equal(part(array, region), values(array)[slices(region)])


def test_each_number_is_within_half_a_step() -> None:
    held = weight_and_scale(32, 256, 0, FP16)
    arrays = opened(held)
    found = {name: values(array) for name, (array, _) in pack("w", arrays["w"], arrays["s"], 64, BF16, 64).items()}
    inverse, steps = found["prequant_scaling_factor"].astype(np.float64), found["weights_scaling_factor"]
    assert np.array_equal(inverse.astype(np.float32), (1 / held["s"]).astype(BF16).astype(np.float32))
    assert np.array_equal(steps, steps.astype(BF16).astype(np.float32)), "as kernels have them"
    bytes_ = found["weight"].view(np.uint8).astype(int)
    codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=1).reshape(32, 256)
    codes = np.where(codes > 7, codes - 16, codes)
    assert {codes.min(), codes.max()} == {-8, 7}
    off = np.abs(codes * np.repeat(steps, 64, axis=1) - held["w"].astype(np.float64) / inverse)
    assert (off <= np.repeat(steps, 64, axis=1) * (0.5 + 2.0**-6)).all()
    assert not codes[:, :64].any()


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("out", [2, 4, 6, 8, 34])
def test_the_step_of_zeros_is_one_zero(zero: float, out: int) -> None:
    """+0, on every processor and in pieces of any size."""
    arrays = opened({"w": np.full((out, 192), zero, FP16), "s": np.ones(192, np.float32)})
    steps = values(pack("w", arrays["w"], arrays["s"], 64, FP16, 64)["weights_scaling_factor"][0])
    assert not steps.any()
    assert not np.signbit(steps).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(value: float) -> None:
    held = weight_and_scale(4, 128, 0, FP16)
    held["w"][3, 100] = value
    arrays = opened(held)
    packed = pack("model.layers.0.mlp.down_proj.weight", arrays["w"], arrays["s"], 64, FP16, 64)
    for name in ("weight", "weights_scaling_factor"):
        with pytest.raises(BadInput, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
            values(packed[name][0])
