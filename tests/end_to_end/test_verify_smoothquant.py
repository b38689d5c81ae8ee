"""`headrace verify` reads SmoothQuant: what is right passes, each kind of damage is found, and activations have 8 bits."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pipeline.tensor.placement import whole
from stages.read.ranks import open_checkpoint
from stages.verify.contract.integrity import headers
from stages.verify.forward.weights import CheckpointWeights, as_int8
from tests.support.commands import headrace
from tests.support.places import DATA
from tests.support.quantized_checkpoints import Arrays

FOLDER = DATA / "smoothquant"
CASES = {case["case"]: case for case in json.loads((FOLDER / "cases.json").read_text())}
TENSOR, CHANNEL = "q_bf16-sq-tp1pp1", "q_bf16-sq_pc_pt-tp2pp1"
STATIC, CACHE = "q_bf16-sq_pc-tp2pp1", "q_bf16-sq_int8kv-tp2pp1"


def converted(case: str, output: Path) -> Path:
    """The source's directory; its conversion is at `output`."""
    flag, model, *arguments = shlex.split(CASES[case]["arguments"])
    ranges = ("--act_range", FOLDER / "expected" / case / "act_range.safetensors")
    ran = headrace("convert", flag, FOLDER / model, *arguments, *ranges, "--output_dir", output, "--scheduler", "threads")
    assert ran.code == 0, ran.err
    return FOLDER / model


@pytest.mark.parametrize("case", CASES)
def test_the_files_of_the_reference_are_what_is_expected(case: str) -> None:
    checkpoint = open_checkpoint(FOLDER / "expected" / case)
    assert not list(headers(checkpoint))


@pytest.mark.parametrize("case", CASES)
def test_outputs_pass(case: str, tmp_path: Path) -> None:
    source = converted(case, tmp_path / "out")
    ran = headrace("verify", tmp_path / "out", "--source", source, "--json")
    assert ran.code == 0, ran


@pytest.mark.parametrize("case", [TENSOR, CHANNEL])
def test_the_ranks_run_as_their_joined_weights(case: str, tmp_path: Path) -> None:
    source = converted(case, tmp_path / "out")
    ran = headrace("verify", tmp_path / "out", "--source", source, "--logits", "--json")
    assert ran.code == 0, ran
    against = {each["against"]: each["max_relative"] for each in json.loads(ran.out)["logits"]["comparisons"]}
    assert against["joined ranks"] < 1e-5
    assert 1e-3 < against["source"] < 0.2, "activations of 8 bits"


def nudged(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Arrays], None]:
    def edit(tensors: Arrays) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name])).astype(tensors[name].dtype)

    return edit


def first(by: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.reshape(-1)[0] += type(values.reshape(-1)[0])(by) if values.dtype == np.int8 else by * values.reshape(-1)[0]
        return values

    return change


LAYER = "transformer.layers.1"
DAMAGE = {
    "a code": (CHANNEL, f"{LAYER}.mlp.fc.weight", first(3)),
    "a code of a row-parallel module": (TENSOR, f"{LAYER}.mlp.proj.weight", first(3)),
    "a scale of a row": (CHANNEL, f"{LAYER}.attention.qkv.per_channel_scale", first(0.1)),
    "a scale of a matrix": (TENSOR, f"{LAYER}.mlp.gate.per_channel_scale", first(0.1)),
    "a scale of outputs": (STATIC, f"{LAYER}.attention.dense.act_scale", first(0.1)),
    "a scale of activations": (STATIC, f"{LAYER}.input_layernorm.scale_to_int", first(0.1)),
    "a scale of activations without a norm": (TENSOR, f"{LAYER}.mlp.quantization_scaling_factor", first(0.1)),
    "a factor": (CHANNEL, f"{LAYER}.attention.dense.smoother", first(0.2)),
    "a norm": (CHANNEL, f"{LAYER}.post_layernorm.weight", first(0.2)),
    "a sign of a norm": (CHANNEL, f"{LAYER}.input_layernorm.weight", first(-2)),
    "a scale below 0": (CHANNEL, f"{LAYER}.mlp.proj.per_channel_scale", first(-2)),
    "a cache's scale that is none": (
        "q_bf16-sq_int8kv-tp2pp1",
        f"{LAYER}.attention.kv_cache_scaling_factor",
        lambda old: old * np.nan,
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found(what: str, tmp_path: Path) -> None:
    case, name, change = DAMAGE[what]
    source, path = converted(case, tmp_path / "out"), tmp_path / "out" / "rank0.safetensors"
    tensors = load_file(path)
    nudged(name, change)(tensors)
    save_file(tensors, path)
    (tmp_path / "out" / "headrace.json").unlink()  # whose checksums would tell it at once
    ran = headrace("verify", tmp_path / "out", "--source", source, "--json")
    assert ran.code == 5, ran
    assert "transformer.layers.1" in ran.out


@pytest.mark.parametrize("missing", ["mlp.quantization_scaling_factor", "input_layernorm.scale_to_int", "mlp.proj.smoother"])
def test_a_tensor_that_its_classes_ask_for(missing: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "expected" / TENSOR, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "rank0.safetensors")
    del tensors[f"{LAYER}.{missing}"]
    save_file(tensors, tmp_path / "out" / "rank0.safetensors")
    ran = headrace("verify", tmp_path / "out", "--json")
    assert ran.code == 5
    assert f"{LAYER}.{missing}" in ran.out


@pytest.mark.parametrize("case", [STATIC, CHANNEL], ids=["one scale", "by token"])
def test_a_product_is_that_of_int8_codes(case: str) -> None:
    """As the kernel has it: codes of both multiplied as integers, then scaled."""
    checkpoint = open_checkpoint(FOLDER / "expected" / case)
    rank, name = checkpoint.ranks[0], "transformer.layers.0.attention.dense"

    def values(parameter: str) -> torch.Tensor:
        tensor = rank[parameter]
        return torch.from_numpy(np.array(tensor.block(whole(tensor.shape))))

    weight = values(f"{name}.weight").double()
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    smoothed = x / values(f"{name}.smoother")
    if case == STATIC:
        step = values("transformer.layers.0.attention.quantization_scaling_factor").double()
        scale = values(f"{name}.act_scale").double()
    else:
        step = 127 / smoothed.abs().amax(1, keepdim=True).double()
        scale = 1 / step
    codes = (smoothed.double() * step).round().clamp(-128, 127)
    expected = (codes @ weight.T) * scale * values(f"{name}.per_channel_scale").double()
    actual = CheckpointWeights(checkpoint, 1 << 20).product(x, 0, name, len(weight))
    assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_activations_beyond_the_range_stay_at_its_end() -> None:
    assert as_int8(torch.tensor([[3.0, -3.0, 0.4]]), 100.0)[0].tolist() == pytest.approx([1.27, -1.28, 0.4])
