"""A quantized lm_head, or a module that no target has: its codes are made numbers, and say nothing of the layers' algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import convert
from pipeline.reporting.verification import verify
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA, Format
from tests.support.rank_files import read
from tests.support.rank_matrices import quantization

MIMO = {**LLAMA, "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
BOTH = {"config_groups": {"layers": {"weights": {"num_bits": 4}}, "head": {"weights": {"num_bits": 8}}}}
# The layers' format, that of the head, and the algorithm of the layers.
HEADS: dict[str, tuple[Format, Format, str]] = {
    "gptq": (source.gptq(sym=False), source.gptq(sym=False), "W4A16_GPTQ"),
    "gptq in the activations' order": (source.gptq(sym=False), source.gptq(sym=False, index="order"), "W4A16_GPTQ"),
    "dynamic float8": (source.modelopt_float8(cache=False), source.compressed_float8(dynamic=True), "FP8"),
    "nvfp4 weights alone": (source.nvfp4(), source.nvfp4(inputs=False), "NVFP4"),
    "8 bits, which comes first": (source.compressed(), source.compressed(bits=8), "W4A16_GPTQ"),
}


def with_module(directory: Path, kind: Format, other: Format, module: str, config: Mapping[str, Any] = LLAMA) -> np.ndarray:
    """Save a quantized model with one more module in another format; returns what that stands for."""
    tensors = {name: array for name, array in source.values(dict(config)).items() if not name.endswith("o_proj.bias")}
    stored, _ = source.quantized(tensors, kind, config["num_hidden_layers"])
    packed = other.quantizer(module, tensors["lm_head.weight"].astype(np.float32))
    stored.pop(f"{module}.weight", None)
    stored |= {f"{module}.{key}": np.ascontiguousarray(values) for key, values in packed.parameters.items()}
    checkpoints.save(directory, source.described(dict(config), kind), stored)
    return packed.weight


@pytest.mark.parametrize("case", HEADS)
def test_the_layers_decide(case: str, tmp_path: Path) -> None:
    kind, head, algorithm = HEADS[case]
    if case.startswith("8 bits"):
        kind = replace(kind, settings={**kind.settings, **BOTH})
    wanted = with_module(tmp_path / "model", kind, head, "lm_head").astype(np.float16)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == algorithm
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        np.testing.assert_array_equal(ours["lm_head.weight"], np.split(wanted, 2)[rank])
    verify(tmp_path / "out", tmp_path / "model").check()


def test_modules_that_no_target_has_decide_nothing(tmp_path: Path) -> None:
    kind = source.modelopt_float8(cache=False)
    with_module(tmp_path / "model", kind, source.compressed_float8(dynamic=True), "model.mtp_layers.0.mlp.up_proj", MIMO)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads")
    assert quantization(tmp_path / "out")["quant_algo"] == "FP8"
