"""What headrace makes of every quantized source, and of numbers made of them, passes its own verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import convert
from pipeline.reporting.verification import verify
from tests.support import checkpoints, quantized_checkpoints
from tests.support.commands import headrace
from tests.support.examples import by_night

FORMATS = {
    **quantized_checkpoints.formats(),
    "gptq act-order": quantized_checkpoints.gptq(index="order", sym=False),
    "compressed w4a16 act-order": quantized_checkpoints.compressed(order=True),
}
INT8 = {"use_weight_only": True}
# What is asked beyond the format's own options, by format.
ASKED: dict[str, list[dict[str, Any]]] = {
    "gptq asymmetric": [
        {},
        {"sm": 90},
        {"sm": 100},
        {"dequantize": True},
        {"dequantize": True, **INT8},
        {"requantize": True},
        {"pp_size": 2},
    ],
    "gptq act-order": [{"requantize": True}, {"dequantize": True}, {"dequantize": True, "use_fp8_rowwise": True}],
    "compressed w8a8": [{}, {"dequantize": True}, {"dequantize": True, **INT8}],
    "compressed fp8": [{}, {"dequantize": True}, {"fp8_kv_cache": True}],
    "compressed fp8 dynamic": [{}, {"dequantize": True}],
    "modelopt fp8": [{}, {"fp8_kv_cache": True}],
    "modelopt awq": [{}, {"dequantize": True}],
    "gptq 3 bits": [{}, {"dequantize": True}, {"requantize": True}],
    "fp8 block": [{}, INT8, {"use_fp8_rowwise": True}],
    "nvfp4": [{}, {"pp_size": 2}, {"dequantize": True}],
    "nvfp4 cache": [{}, {"fp8_kv_cache": True}],
    "mxfp4": [{}, {"use_fp8_rowwise": True}],
    "bitsandbytes nf4 nested": [{}, INT8],
    "compressed w4a16 act-order": [{"dequantize": True}, {"requantize": True}],
}
CASES = [(name, more) for name in FORMATS for more in ASKED.get(name, [{}])]


@pytest.mark.parametrize("dtype", by_night(["float16", "bfloat16"], ["float16"]))
@pytest.mark.parametrize(("name", "more"), CASES, ids=str)
def test_each_format(name: str, more: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    config = {**quantized_checkpoints.LLAMA, "num_hidden_layers": 3 if name == "fbgemm" else 2}
    quantized_checkpoints.write(tmp_path / "model", config, FORMATS[name])
    options = {"tp_size": 2, "dtype": dtype, "scheduler": "synchronous", **FORMATS[name].flags, **more}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", **options)
    result = verify(tmp_path / "ranks", tmp_path / "model")
    result.check()
    assert result.round_trip is not None
    assert result.round_trip["tensors"]


@pytest.mark.parametrize("mlp_bias", ["omit", "keep"])
def test_biases_that_are_left_out_are_known_to_be(mlp_bias: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "mlp_bias": True, "attention_bias": True})
    options = {"tp_size": 2, "mlp_bias": mlp_bias, "scheduler": "synchronous"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", **options)
    verify(tmp_path / "ranks", tmp_path / "model").check()


def test_logits_show_biases_that_are_missing_and_no_others(tmp_path: Path) -> None:
    """Kept biases are what transformers computes with; left out, the ranks are another model of the source's values."""
    model, config = tmp_path / "model", {**checkpoints.LLAMA, "mlp_bias": True}
    checkpoints.write(model, config)
    for mlp_bias in ({}, {"mlp_bias": "omit"}):
        output = tmp_path / "".join(["ranks", *mlp_bias.values()])
        convert(model_dir=model, output_dir=output, tp_size=2, scheduler="synchronous", **mlp_bias)
        ran = headrace("verify", output, "--source", model, "--logits", "--tokens", 7)
        assert ran.code == (5 if mlp_bias else 0), ran
        assert headrace("verify", output, "--source", model).code == 0
    assert "logits" in ran.err
    zeros = {
        name: values * 0 if ".mlp." in name and name.endswith("bias") else values
        for name, values in checkpoints.values(config).items()
    }
    checkpoints.save(tmp_path / "zeros", config, zeros)
    convert(model_dir=tmp_path / "zeros", output_dir=tmp_path / "none", mlp_bias="omit", scheduler="synchronous")
    assert headrace("verify", tmp_path / "none", "--source", tmp_path / "zeros", "--logits", "--tokens", 7).code == 0


def test_quantized_tensors_beside_their_base(tmp_path: Path) -> None:
    """`--quant_ckpt_path`: the tensors that stand in for those of the base."""
    config = quantized_checkpoints.LLAMA
    checkpoints.save(tmp_path / "base", config, quantized_checkpoints.values(config))
    quantized_checkpoints.write(tmp_path / "packed", config, FORMATS["gptq"])
    options = {"tp_size": 2, "dtype": "float16", "scheduler": "synchronous"}
    convert(model_dir=tmp_path / "base", quant_ckpt_path=tmp_path / "packed", output_dir=tmp_path / "ranks", **options)
    verify(tmp_path / "ranks", tmp_path / "base", quant_ckpt_path=tmp_path / "packed").check()


@pytest.mark.parametrize("name", FORMATS)
def test_packed_routers(name: str, tmp_path: Path) -> None:
    """A router is float32 in the ranks, whatever it was in the source; experts are as the format and the options say."""
    experts = 32 if name.startswith(("gptq 2", "gptq 3", "gptq planar")) else 8  # as many as fill a run of its words
    config = {**quantized_checkpoints.MIXTRAL, "num_local_experts": experts, "num_hidden_layers": 1}
    kind = FORMATS[name]
    stored, _ = quantized_checkpoints.quantized(quantized_checkpoints.values(config), kind, 1)
    gate = "model.layers.0.block_sparse_moe.gate"
    packed = kind.quantizer(gate, stored.pop(f"{gate}.weight").astype(np.float32))
    stored |= {f"{gate}.{key}": np.ascontiguousarray(values) for key, values in packed.parameters.items()}
    checkpoints.save(tmp_path / "model", quantized_checkpoints.described(config, kind), stored)
    for file, content in kind.files.items():
        (tmp_path / "model" / file).write_text(json.dumps(content))
    # Experts of these have no kernel (docs/quantization.md).
    alone = not kind.algorithm.startswith("W4A16_GPTQ") or "act-order" in name
    options = {"dequantize": alone, "tp_size": 2, "dtype": "bfloat16", "scheduler": "synchronous"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks", **options)
    verify(tmp_path / "ranks", tmp_path / "model").check()
    for rank in range(2):
        router = load_file(tmp_path / f"ranks/rank{rank}.safetensors")["transformer.layers.0.mlp.router.weight"]
        assert router.dtype == torch.float32
        np.testing.assert_allclose(router.numpy(), packed.weight, rtol=1e-6, atol=0)
