"""Checkpoints that quantizers made (tests/data/tools): our numbers are those that the tool computes with, bit for bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from stages.read.safetensors import open_file
from tests.support.commands import headrace
from tests.support.places import DATA

MADE = sorted(path.parent for path in (DATA / "tools").rglob("expected.json"))
# The tensors of a rank and the modules whose rows they have, in order.
PARTS = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.dense": ["self_attn.o_proj"],
    "mlp.fc": ["mlp.gate_proj"],
    "mlp.gate": ["mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}
each_checkpoint = pytest.mark.parametrize("model", MADE, ids=lambda path: f"{path.parent.name}/{path.name}")


def sums(rank: Path, layers: int, rows: dict[str, int]) -> dict[str, str]:
    """The SHA-256 of each linear's bytes in a rank, by the module's name in the source. `rows`: those of each module."""
    _, tensors = open_file(rank)
    result = {}
    for layer in range(layers):
        for name, modules in PARTS.items():
            tensor, start = tensors[f"transformer.layers.{layer}.{name}.weight"], 0
            for module in modules:
                end = start + rows[module]
                values = np.asarray(tensor.block(((start, end), (0, tensor.shape[1]))))
                values = values + np.zeros((), values.dtype)  # a zero has no sign
                result[f"model.layers.{layer}.{module}"] = hashlib.sha256(values.tobytes()).hexdigest()
                start = end
            assert start == tensor.shape[0]
    return result


@each_checkpoint
def test_numbers_are_those_of_the_tool(model: Path, tmp_path: Path) -> None:
    expected = json.loads((model / "expected.json").read_text())
    out = tmp_path / "out"
    ran = headrace(
        "convert", "--model_dir", model, "--output_dir", out, "--dequantize", "--dtype", expected["dtype"], "--scheduler", "threads"
    )
    assert ran.code == 0, ran
    found = sums(out / "rank0.safetensors", expected["layers"], expected["rows"])
    assert found == expected["sha256"]


@each_checkpoint
def test_it_is_converted_and_verified(model: Path, tmp_path: Path) -> None:
    """Its codes are kept where an algorithm takes them, with the options that it takes them with."""
    expected = json.loads((model / "expected.json").read_text())
    options = ("--scheduler", "threads", "--quiet", *expected["options"])
    ran = headrace("convert", "--model_dir", model, "--output_dir", tmp_path / "out", *options)
    assert ran.code == 0, ran
    ran = headrace("verify", tmp_path / "out", "--source", model, "--quiet")
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["quant_algo"] == expected["quant_algo"]


def test_there_is_something_to_check() -> None:
    assert {path.parent.name for path in MADE} == {"auto-round", "gptqmodel", "llm-compressor", "modelopt"}
    assert all(sum(file.stat().st_size for file in path.iterdir()) < 160_000 for path in MADE)
