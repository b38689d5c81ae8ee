"""Float8 sources: one scale or one for each out-feature, whatever their shape and type; refusals."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.quantization import clamp_of
from pipeline.tensor.placement import slices, whole
from stages.quantization.numbers import dequantize
from stages.quantization.sources.fp8_scaled import FORMAT
from stages.unpack import format_of
from tests.support.examples import examples
from tests.support.lazy import held, values
from tests.support.packed_tensors import CHUNKS, opened, part
from tests.support.strategies import regions

F8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Every code but the two that are no numbers, in a random order."""
    numbers = np.array([code for code in range(256) if code & 127 != 127], dtype=np.uint8)
    return np.random.default_rng(seed).choice(numbers, (n, k)).view(F8)


def test_every_code_is_the_number_that_torch_has_for_it() -> None:
    weight = np.arange(256, dtype=np.uint8).view(F8).reshape(2, 128)
    result = FORMAT.unpack(opened({"weight": weight, "weight_scale": np.ones((), np.float32)}), {})
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy().reshape(2, 128)
    np.testing.assert_array_equal(values(dequantize(result)), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("by_row", [True, False])
@examples(15)
@given(data=st.data(), n=st.integers(2, 9), k=st.integers(1, 9), chunk=st.sampled_from(CHUNKS), seed=st.integers(0, 99))
def test_any_part_is_code_times_scale(
    dtype: type, by_row: bool, data: st.DataObject, n: int, k: int, chunk: int, seed: int
) -> None:
    shape = data.draw(st.sampled_from([(n,), (n, 1)] if by_row else [(), (1,), (1, 1)]))
    weight = codes(n, k, seed)
    scale = np.random.default_rng(seed).uniform(1e-4, 1e-1, shape).astype(dtype)
    result = FORMAT.unpack(opened({"weight": weight, "weight_scale": scale}, chunk), {})
    kind = "channel_scale" if by_row else "tensor_scale"
    assert result.keys() == {"fp8", kind}
    assert result[kind].dtype == np.float32
    flat = scale.astype(np.float32).reshape(-1)
    assert values(result[kind]).tobytes() == flat.tobytes()
    region = data.draw(regions(weight.shape))
    assert part(result["fp8"], region).tobytes() == np.ascontiguousarray(weight[slices(region)]).tobytes()
    expected = weight.astype(np.float32) * flat.reshape(-1, 1)
    np.testing.assert_array_equal(part(dequantize(result), region), expected[slices(region)])


def test_part_of_the_scales_of_the_rows() -> None:
    scale = np.arange(1, 9, dtype=np.float32).reshape(8, 1)
    result = FORMAT.unpack(opened({"weight": codes(8, 4), "weight_scale": scale}), {})["channel_scale"]
    assert part(result, ((3, 6),)).tolist() == [4.0, 5.0, 6.0]


def test_a_matrix_of_one_row_has_one_scale() -> None:
    result = FORMAT.unpack(opened({"weight": codes(1, 4), "weight_scale": np.ones((1, 1), np.float32)}), {})
    assert result.keys() == {"fp8", "tensor_scale"}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_scale_of_activations(shape: tuple[int, ...]) -> None:
    source = {"weight": codes(4, 4), "weight_scale": np.ones((), np.float32), "bias": np.ones(4, np.float16)}
    source |= {"input_scale": np.full(shape, 0.25, BF16), "input_scale_ub": np.full((1,), 1200, np.float32)}
    arrays = opened(source)
    result = FORMAT.unpack(arrays, {})
    assert result.keys() == {"fp8", "tensor_scale", "input_scale", "bias"}
    assert result["input_scale"].dtype == np.float32
    assert part(result["input_scale"], whole((1,))).tolist() == [0.25]
    assert result["bias"] is arrays["bias"]


def test_it_is_known_by_its_parameters() -> None:
    tensors = held({"weight": codes(2, 2), "weight_scale": np.ones((), np.float32)})
    found = format_of(tensors)
    assert found is not None
    assert found.name == "float8"
    assert not FORMAT.accepts({"weight": tensors["weight"]})
    assert not FORMAT.accepts(held({"weight": np.ones((2, 2), np.float16), "weight_scale": np.ones(())}))


def problems(source: dict[str, np.ndarray], settings_: dict[str, Any] | None = None) -> list[str]:
    tensors = {"weight": codes(8, 16), "weight_scale": np.ones((8, 1), np.float32), **source}
    return [str(problem) for problem in FORMAT.check("a.b", held(tensors), settings_ or {})]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (8, 1)])
def test_what_is_right_is_not_refused(shape: tuple[int, ...]) -> None:
    bound = {"input_scale_ub": np.full((1,), 1200, np.float32)}
    assert problems({"weight_scale": np.ones(shape, np.float32), **bound, "input_scale": np.ones(())}) == []
    assert problems(bound, {"activation_scale_ub": 1200.0}) == []


@pytest.mark.parametrize("shape", [(8, 2), (1, 1, 1), (16,), (1, 16), (2,), (0,)])
def test_scales_by_block_or_of_something_else(shape: tuple[int, ...]) -> None:
    expected = f"a.b.weight_scale: found shape {list(shape)}; expected one scale, or one for each of 8 out-features"
    assert problems({"weight_scale": np.ones(shape, np.float32)}) == [expected]


@pytest.mark.parametrize("name", ["input_scale", "input_scale_ub"])
@pytest.mark.parametrize("shape", [(3,), (0,), (8, 1)])
def test_several_scales_where_one_belongs(name: str, shape: tuple[int, ...]) -> None:
    assert problems({name: np.ones(shape, np.float32)}) == [f"a.b.{name}: found shape {list(shape)}; expected one scale"]


@pytest.mark.parametrize("shape", [(), (8,), (2, 8, 16)])
def test_a_weight_that_is_no_matrix(shape: tuple[int, ...]) -> None:
    assert problems({"weight": np.zeros(shape, F8)}) == [f"a.b.weight: found shape {list(shape)}; expected a matrix"]


@pytest.mark.parametrize(
    ("inputs", "noted"),
    [(None, True), ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, False)],
    ids=["16 bits", "quantized"],
)
def test_activations_that_the_source_leaves_in_16_bits_are_spoken_of(inputs: dict[str, Any] | None, noted: bool) -> None:
    scheme = {"weights": {"num_bits": 8, "type": "float"}, "input_activations": inputs}
    notes = FORMAT.notes({"config_groups": {"group_0": scheme}}, "FP8_PER_CHANNEL_PER_TOKEN")
    assert [("16 bits" in note, "--dequantize" in note) for note in notes] == [(True, True)] * noted
    assert FORMAT.notes({"quant_method": "fbgemm_fp8"}, "FP8_PER_CHANNEL_PER_TOKEN") == []


@pytest.mark.parametrize("said", [0, -1, True, "1200", float("nan"), float("inf"), 10**400, 1e300], ids=lambda said: str(said)[:9])
def test_what_is_no_bound_is_a_problem_of_the_settings_alone(said: Any) -> None:
    assert clamp_of({"activation_scale_ub": said}) is None
    assert problems({"input_scale_ub": np.full((1,), 600, np.float32)}, {"activation_scale_ub": said}) == []
    assert [clamp_of({"activation_scale_ub": bound}) for bound in (None, 900, 1e-3)] == [1200, 900, 1e-3]


@pytest.mark.parametrize(
    ("settings_", "said"), [({"activation_scale_ub": 900.0}, "900"), ({}, "1200"), ({"activation_scale_ub": None}, "1200")]
)
def test_another_bound_of_the_activations_than_is_written(settings_: dict[str, Any], said: str) -> None:
    """config.json says the bound of the settings for all modules, or the default."""
    found = problems({"input_scale_ub": np.full((1,), 600, np.float32)}, settings_)
    assert found == [f"a.b.input_scale_ub: found 600; expected {said}, activation_scale_ub of the settings or its default"]
