"""What headrace makes of every quantized source, and of numbers made of them, passes its own verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.reporting.verification import verify
from tests.support import checkpoints, quantized_checkpoints

FORMATS = {
    **quantized_checkpoints.formats(),
    "gptq act-order": quantized_checkpoints.gptq(index="order", sym=False),
    "compressed w4a16 act-order": quantized_checkpoints.compressed(index="order"),
}
INT8 = {"use_weight_only": True}
# What is asked beyond the format's own options, by format.
ASKED: dict[str, list[dict[str, Any]]] = {
    "gptq asymmetric": [{}, {"sm": 90}, {"dequantize": True}, {"dequantize": True, **INT8}, {"requantize": True}, {"pp_size": 2}],
    "gptq act-order": [{"requantize": True}, {"dequantize": True}, {"dequantize": True, "use_fp8_rowwise": True}],
    "compressed w8a8": [{"dequantize": True}, {"dequantize": True, **INT8}],
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
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


def test_quantized_tensors_beside_their_base(tmp_path: Path) -> None:
    """`--quant_ckpt_path`: the tensors that stand in for those of the base."""
    config = quantized_checkpoints.LLAMA
    checkpoints.save(tmp_path / "base", config, quantized_checkpoints.values(config))
    quantized_checkpoints.write(tmp_path / "packed", config, FORMATS["gptq"])
    options = {"tp_size": 2, "dtype": "float16", "scheduler": "synchronous"}
    convert(model_dir=tmp_path / "base", quant_ckpt_path=tmp_path / "packed", output_dir=tmp_path / "ranks", **options)
    verify(tmp_path / "ranks", tmp_path / "base", quant_ckpt_path=tmp_path / "packed").check()
