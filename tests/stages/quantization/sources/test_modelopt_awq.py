"""ModelOpt's INT4-AWQ: two out-features a byte become two in-features a byte, any part of them; refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.placement import slices
from stages.quantization.numbers import dequantize
from stages.quantization.sources.modelopt_awq import FORMAT
from stages.unpack import format_of
from tests.support.examples import examples
from tests.support.lazy import held, values
from tests.support.packed_tensors import (
    CHUNKS,
    expected_codes,
    modelopt,
    naive_weight,
    opened,
    part,
    random_codes,
    random_scales,
    shapes,
)
from tests.support.strategies import regions


def module(n: int, k: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned codes [N, K] and scales [G, N]."""
    return random_codes((n, k), 4, seed), random_scales((groups, n), seed, np.float32)


@examples(50)
@given(data=st.data(), size=shapes(2, 2), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_of_the_codes_and_scales(data: st.DataObject, size: tuple[int, int, int], chunk: int, seed: int) -> None:
    codes, scales = module(*size, seed)
    result = FORMAT.unpack(opened(modelopt(codes, scales), chunk), {})
    assert result.keys() == {"codes4", "scales", "offsets"}
    wanted = {"codes4": expected_codes(codes, 4), "scales": scales, "offsets": np.zeros(scales.shape, np.int16)}
    for name, expected in wanted.items():
        region = data.draw(regions(expected.shape))
        assert result[name].shape == expected.shape
        assert np.array_equal(part(result[name], region), expected[slices(region)]), name


def test_every_pair_of_codes() -> None:
    low, high = np.repeat(np.arange(16), 16), np.tile(np.arange(16), 16)
    codes = np.stack([low, high])
    result = FORMAT.unpack(opened(modelopt(codes, np.ones((1, 2), np.float32))), {})
    assert np.array_equal(values(result["codes4"]), expected_codes(codes, 4))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("smooth", [True, False])
def test_the_weight_is_code_times_scale_times_what_the_activations_are_multiplied_by(chunk: int, smooth: bool) -> None:
    codes, scales = module(8, 12, 3)
    factors = np.linspace(0.5, 2, 12).astype(np.float16)
    source = modelopt(codes, scales) | ({"pre_quant_scale": factors} if smooth else {}) | {"bias": np.ones(8, np.float16)}
    arrays = opened(source, chunk)
    result = FORMAT.unpack(arrays, {})
    assert result.keys() == {"codes4", "scales", "offsets", "bias"} | ({"prequant"} if smooth else set())
    assert result["bias"] is arrays["bias"]
    expected = naive_weight(codes, np.full(scales.shape, 8), scales, smooth=factors if smooth else None)
    assert np.array_equal(values(dequantize(result)), expected)
    assert np.array_equal(part(dequantize(result), ((3, 7), (5, 11))), expected[3:7, 5:11])


def test_it_is_known_by_its_parameters() -> None:
    tensors = held(modelopt(*module(4, 4, 1)))
    found = format_of(tensors)
    assert found is not None
    assert found.name == "modelopt-awq"
    assert not FORMAT.accepts({"weight": tensors["weight"]})


def refusal(tensors: dict[str, np.ndarray], settings_: dict[str, Any] | None = None) -> str:
    (problem,) = FORMAT.check("a.b", held(tensors), settings_ or {})
    return str(problem)


@pytest.mark.parametrize("settings_", [{}, {"group_size": 4}, {"group_size": None}])
def test_what_is_right_is_not_refused(settings_: dict[str, Any]) -> None:
    assert FORMAT.check("a.b", held(modelopt(*module(8, 8, 2))), settings_) == []


@pytest.mark.parametrize(
    ("shape", "settings_", "expected"),
    [
        ((8, 2), {"group_size": 8}, "[8, 8 / 8]"),
        ((4, 2), {}, "[8, 8 / 4]"),
        ((8, 3), {}, "[8, 8 / 2]"),
        ((8, 0), {}, "[8, 8 / group size]"),
        ((8,), {}, "[8, 8 / 1]"),
        ((), {}, "[8, 8 / group size]"),
    ],
)
def test_scales_that_are_not_those_of_the_groups(shape: tuple[int, ...], settings_: dict[str, Any], expected: str) -> None:
    tensors = {**modelopt(*module(8, 8, 2)), "weight_scale": np.ones(shape, np.float32)}
    assert refusal(tensors, settings_) == f"a.b.weight_scale: found shape {list(shape)}; expected {expected}"


@pytest.mark.parametrize("shape", [(), (8,), (2, 4, 8), (4, 7)])
def test_a_weight_that_is_no_matrix_of_pairs(shape: tuple[int, ...]) -> None:
    tensors = {**modelopt(*module(8, 8, 2)), "weight": np.zeros(shape, np.uint8)}
    assert refusal(tensors) == f"a.b.weight: found shape {list(shape)}; expected [out-features / 2, in-features]"


def test_four_bit_floats_of_the_same_names_are_refused() -> None:
    """NVFP4: two in-features a byte, scales of float8 by 16."""
    tensors = {"weight": np.zeros((16, 32), np.uint8), "weight_scale": np.ones((16, 4), np.float32)}
    assert refusal(tensors) == "a.b.weight_scale: found shape [16, 4]; expected [32, 32 / 8]"
