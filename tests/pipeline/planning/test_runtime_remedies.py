"""What a plan advises where TensorRT-LLM's class does not compute a model helps whoever follows it, of quantized sources too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline import convert, plan
from pipeline.model.runtime import runtime
from pipeline.reporting.verification import verify
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import one, refused
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, Format

GEMMA_3 = {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "tie_word_embeddings": True}
GEMMA_3 |= {"hidden_act": "gelu_pytorch_tanh"}
QWEN_3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SIZES = {key: value for key, value in checkpoints.LLAMA.items() if key not in ("architectures", "hidden_act", "torch_dtype")}
HEADS = ("self_attn.q_norm", "self_attn.k_norm")
AROUND = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
# A source's model, and the format of its codes.
CASES: dict[str, tuple[dict[str, Any], Callable[[], Format]]] = {
    "float8 by row of Gemma 3": (GEMMA_3, lambda: source.compressed_float8(dynamic=True)),
    "float8 by row of experts": (MIXTRAL, lambda: source.compressed_float8(dynamic=True)),
    "awq of experts": (MIXTRAL, source.modelopt_awq),
    "nvfp4 of experts": (MIXTRAL, source.nvfp4),
}
INT4: dict[str, Any] = {"use_weight_only": True, "weight_only_precision": "int4"}
NUMBERS: list[dict[str, Any]] = [{}, {"use_weight_only": True}, INT4]
AGAIN = {"requantize": True, "use_weight_only": True, "weight_only_precision": "int4_gptq", "group_size": 128}


def model_of(directory: Path, config: dict[str, Any], kind: Format) -> Path:
    tensors = source.values(config)
    sizes = dict.fromkeys(HEADS if config is not MIXTRAL else (), 64) | dict.fromkeys(AROUND if config is GEMMA_3 else (), 256)
    for layer in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}.weight": np.ones(size, np.float16) for name, size in sizes.items()}
    source.write(directory, config, kind, tensors=tensors)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_who_follows_the_advice_has_a_plan(case: str, tmp_path: Path) -> None:
    config, kind = CASES[case]
    model = model_of(tmp_path / "model", config, kind())
    told = one(refused(model))
    assert "with --dequantize if the source is quantized" in told
    for options in NUMBERS:
        plan(model_dir=model, output_dir=tmp_path / "out", dequantize=True, **options)
    assert ("or --requantize --use_weight_only --weight_only_precision int4_gptq --group_size 128" in told) is (config is MIXTRAL)
    if config is MIXTRAL:
        plan(model_dir=model, output_dir=tmp_path / "out", **AGAIN)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"quantization": "fp8_rowwise"}])
def test_smoothquants_advice_too(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", QWEN_3, source.compressed_int8())
    words = ("--quantization", "w8a8_sq")
    assert "with --dequantize if the source is quantized" in one(refused(model, *words))
    plan(model_dir=model, output_dir=tmp_path / "out", dequantize=True, **options)


@pytest.mark.parametrize("activation", ["fatrelu", "swish", "swiglu"])
def test_an_activation_that_no_class_has_is_refused(activation: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "hidden_act": activation})
    assert f"config.json: hidden_act: found {activation!r}; expected one of silu, gelu, " in one(refused(tmp_path / "model"))


@pytest.mark.parametrize("activation", runtime().activations)
def test_an_activation_that_the_class_has_is_written(activation: str, tmp_path: Path) -> None:
    """Those that are one GELU there are computed alike, but for the plain one, which transformers computes without tanh."""
    model = tmp_path / "model"
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, hidden_act=activation))
    made.to(torch.float32).save_pretrained(model)
    convert(model_dir=model, output_dir=tmp_path / "out", tp_size=2, scheduler="synchronous")
    verify(tmp_path / "out", model, logits=True, tokens=11).check()
