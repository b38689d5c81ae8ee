"""Every family's outputs of NVIDIA's converters, byte for byte: rank files as whole files, config.json key by key."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.cli import app
from tests.goldens.differences import check_config
from tests.support.places import DATA

FAMILIES = DATA / "families"
CASES = {case["case"]: case for case in json.loads((FAMILIES / "cases.json").read_text())}

# The reference lost this model's second layer: its last stage holds the first one again.
REPEATS_A_LAYER = "exaone_pp2"
LAYER = "transformer.layers."


def run(case: str, output: Path, *more: str) -> None:
    arguments = shlex.split(CASES[case]["arguments"])
    arguments[arguments.index("--model_dir") + 1] = str(FAMILIES / "models" / CASES[case]["model"])
    options = ["--output_dir", str(output), "--scheduler", "threads", "--quiet", *more]
    if CASES[case]["model"] == "internlm2":  # its dynamic rope is refused for 1.2, and was written as it is for older releases
        options += ["--rope_scaling", "keep"]
    result = CliRunner().invoke(app, ["convert", *arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("cuts", [(), ("--scratch_after", "read,rename,unpack,shard")], ids=["direct", "scratch"])
@pytest.mark.parametrize("case", [case for case in CASES if case != REPEATS_A_LAYER])
def test_output_equals_the_reference(case: str, cuts: tuple[str, ...], tmp_path: Path) -> None:
    output, expected = tmp_path / "out", FAMILIES / "expected" / case
    run(case, output, *cuts)
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()} | {"headrace.json"}
    for path in expected.glob("*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    check_config(f"families/{case}", output)


@pytest.mark.parametrize("cuts", [(), ("--scratch_after", "read,rename,unpack,shard")], ids=["direct", "scratch"])
def test_the_last_stage_has_the_last_layer(cuts: tuple[str, ...], tmp_path: Path) -> None:
    output, expected = tmp_path / "out", FAMILIES / "expected" / REPEATS_A_LAYER
    run(REPEATS_A_LAYER, output, *cuts)
    check_config(f"families/{REPEATS_A_LAYER}", output)
    assert (output / "rank0.safetensors").read_bytes() == (expected / "rank0.safetensors").read_bytes()

    ours, theirs = load_file(output / "rank1.safetensors"), load_file(expected / "rank1.safetensors")
    assert list(ours) == list(theirs)
    # The same model on one rank, by the reference itself, has both layers.
    both = load_file(FAMILIES / "expected" / "exaone_tp1" / "rank0.safetensors")
    for name, tensor in ours.items():
        if not name.startswith(LAYER):
            assert same(tensor, theirs[name]), name
            continue
        module = name.removeprefix(f"{LAYER}0.")
        assert same(theirs[name], both[f"{LAYER}0.{module}"]), f"the reference's {name} is another than it was"
        assert same(tensor, both[f"{LAYER}1.{module}"]), name
    assert not same(ours[f"{LAYER}0.mlp.fc.weight"], theirs[f"{LAYER}0.mlp.fc.weight"])
    assert len(ours) == len([name for name in both if not name.startswith((f"{LAYER}0.", "transformer.vocab_embedding"))])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_there_is_a_case_of_every_family() -> None:
    def architecture(model: str) -> Any:
        return json.loads((FAMILIES / "models" / model / "config.json").read_text())["architectures"][0]

    # Granite, which the reference does not know, is in tests/end_to_end/test_family_forward.py.
    assert {architecture(case["model"]) for case in CASES.values()} == {
        "ExaoneForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "InternLM2ForCausalLM",
        "Phi3ForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
    assert {case["case"] for case in CASES.values()} == {path.name for path in (FAMILIES / "expected").iterdir()}
