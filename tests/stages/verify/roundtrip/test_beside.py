"""Parameters beside weights have the names of the weights' modules, whatever the source calls these."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.tensor.names import TensorName
from stages.verify.roundtrip.original.beside import named_beside
from tests.support.lazy import Held

TENSOR = Held(np.ones(1, np.float32))
INTERNLM2 = {f"model.layers.0.self_attn.{part}_proj.weight": "model.layers.0.attention.wqkv.weight" for part in "qkv"}
QWEN = {f"model.layers.0.self_attn.{part}_proj.weight": "transformer.h.0.attn.c_attn.weight" for part in "qkv"}
EXAONE = {"model.layers.0.mlp.gate_proj.weight": "transformer.h.0.mlp.c_fc_0.weight"}


@pytest.mark.parametrize(
    ("origins", "module", "parameter", "expected"),
    [
        (INTERNLM2, "model.layers.0.attention.wqkv", "input_scale", [f"self_attn.{part}_proj.input_scale" for part in "qkv"]),
        (INTERNLM2, "model.layers.0.attention", "kv_scale", ["self_attn.kv_scale"]),
        (QWEN, "transformer.h.0.attn.c_attn", "k_scale", [f"self_attn.{part}_proj.k_scale" for part in "qkv"]),
        (QWEN, "transformer.h.0.attn", "v_scale", ["self_attn.v_scale"]),
        (EXAONE, "transformer.h.0.mlp.c_fc_0", "input_scale", ["mlp.gate_proj.input_scale"]),
    ],
)
def test_names_of_scales(origins: dict[str, str], module: str, parameter: str, expected: list[str]) -> None:
    found = named_beside({TensorName(module, parameter): TENSOR, TensorName(module, "weight"): TENSOR}, origins)
    assert found == {f"model.layers.0.{name}": (f"{module}.{parameter}", TENSOR) for name in expected}


def test_a_module_that_nothing_is_known_of_keeps_its_name() -> None:
    assert named_beside({TensorName("other", "k_scale"): TENSOR}, EXAONE) == {"other.k_scale": ("other.k_scale", TENSOR)}
