"""q, k and v of AWQ have one tensor of factors in a rank file: parts that say others are refused, equal ones are written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support import quantized_checkpoints
from tests.support.commands import convert, headrace
from tests.support.quantized_checkpoints import BF16

CONFIG = {**quantized_checkpoints.LLAMA, "torch_dtype": "bfloat16"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    quantized_checkpoints.write(tmp_path / "model", CONFIG, quantized_checkpoints.modelopt_awq())
    return tmp_path / "model"


def with_factors(model: Path, **factors: np.ndarray) -> None:
    """Give the parts of the first layer's attention factors of their own."""
    tensors = load_file(model / "model.safetensors")
    for name, values in factors.items():
        tensors[f"model.layers.0.self_attn.{name}_proj.pre_quant_scale"] = values.astype(BF16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_equal_factors_are_those_of_the_module(model: Path, tmp_path: Path) -> None:
    factors = np.linspace(0.5, 2, CONFIG["hidden_size"])
    with_factors(model, q=factors, k=factors, v=factors)
    assert convert(model, tmp_path / "out", "--tp_size", 2).code == 0
    for rank in range(2):
        tensors = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        np.testing.assert_array_equal(tensors["transformer.layers.0.attention.qkv.prequant_scaling_factor"], factors.astype(BF16))
    assert headrace("verify", tmp_path / "out", "--source", model).code == 0


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("k",)])
def test_other_factors_in_a_part_are_refused(parts: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    factors = {part: np.linspace(0.5, 2, CONFIG["hidden_size"]) for part in parts}
    factors[parts[-1]] = factors[parts[-1]] * 1.5
    with_factors(model, **factors)
    ran = convert(model, tmp_path / "out")
    assert ran.code == 2
    assert "other factors of the activations" in ran.err
    assert "--dequantize" in ran.err
    assert not (tmp_path / "out" / "config.json").exists()
    assert convert(model, tmp_path / "out", "--dequantize").code == 0
    assert headrace("verify", tmp_path / "out", "--source", model).code == 0
