"""Scales of an FP8 cache: taken from any module's parameters, one for each, and refused where they are not one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline.tensor.names import split_names
from stages.quantization.cache_scales import PARAMETERS, check, divided, other_kind, unpack
from stages.unpack import axes
from stages.unpack import check as examine
from stages.unpack import unpack as unpack_all
from tests.support.lazy import held, texts, values
from tests.support.packed_tensors import opened

# Settings that say what a cache is of, and the kind that they say; "" where its scales are those of FP8.
SAID: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"kv_cache_scheme": "static"}, ""),
    ({"kv_cache_scheme": None, "kv_cache_quant_algo": None}, ""),
    ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "kv_cache_quant_algo": "FP8"}, ""),
    ({"kv_cache_quant_algo": "fp8"}, ""),
    ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "integers"),
    ({"kv_cache_quant_algo": "INT8"}, "INT8"),
    ({"kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
    ({"kv_cache_scheme": "NVFP4"}, "NVFP4"),
    ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "4-bit floats"),
    ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
    ({"kv_cache_scheme": {"type": "log"}}, "other-bit logs"),
]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("scales", "expected"),
    [({"k_scale": 0.25, "v_scale": 0.5}, 0.5), ({"kv_scale": 0.25}, 0.25), ({"output_scale": 2.0, "q_scale": 4.0}, 2.0)],
)
def test_the_largest(scales: dict[str, float], expected: float, dtype: Any, shape: tuple[int, ...]) -> None:
    result = unpack(opened({name: np.full(shape, value, dtype) for name, value in scales.items()}), {})
    assert result.keys() == {"kv_scale"}
    assert (result["kv_scale"].shape, result["kv_scale"].dtype) == ((1,), np.float32)
    assert values(result["kv_scale"]).tolist() == [expected]


@pytest.mark.parametrize(("settings", "kind"), SAID)
def test_nothing_of_a_cache_of_another_kind(settings: dict[str, Any], kind: str) -> None:
    assert other_kind(settings) == kind
    one = np.ones(1, np.float32)
    assert unpack(opened({"k_scale": one, "v_scale": one}), settings).keys() == (set() if kind else {"kv_scale"})


def test_nothing_of_queries() -> None:
    one = np.ones(1, np.float32)
    assert unpack(opened({"q_scale": one, "k_zero_point": one}), {}) == {}


def test_a_module_is_divided() -> None:
    rest, scales = divided({"weight": 1, "k_scale": 2, "weight_scale": 3, "output_scale": 4})
    assert rest == {"weight": 1, "weight_scale": 3}
    assert scales == {"k_scale": 2, "output_scale": 4}


@pytest.mark.parametrize("name", [name for name, held_ in PARAMETERS.items() if held_.becomes])
@pytest.mark.parametrize("shape", [(3,), (0,), (8, 1)])
def test_several_scales_where_one_belongs(name: str, shape: tuple[int, ...]) -> None:
    (problem,) = check("a.b", held({name: np.ones(shape, np.float32)}), alone=False)
    assert str(problem) == f"a.b.{name}: found shape {list(shape)}; expected one scale"


def test_a_pair_of_an_attention_module() -> None:
    one = held({"k_scale": np.ones(1, np.float32)})
    (problem,) = check("a.self_attn", one, alone=True)
    assert str(problem) == "a.self_attn.v_scale: found no such tensor; expected one beside k_scale"
    assert check("a.self_attn.k_proj", one, alone=False) == [], "values have theirs elsewhere"


def test_modules_of_any_kind_have_them() -> None:
    one = np.ones(1, np.float32)
    source = {"a.k_proj.weight": np.ones((2, 2), np.float16), "a.k_proj.k_scale": one, "a.k_scale": one, "a.v_scale": 2 * one}
    tensors = split_names(source)
    assert examine(held(tensors), {}).problems == examine(held(tensors), {}).cache == []
    assert axes({}, held(tensors)) == {"a.k_proj": {"k_scale": ("one",)}, "a": {"k_scale": ("one",), "v_scale": ("one",)}}
    result = texts(unpack_all(opened(tensors), {}))
    assert result.keys() == {"a.k_proj.weight", "a.k_proj.kv_scale", "a.kv_scale"}
    assert values(result["a.kv_scale"]).tolist() == [2.0]
