"""NVIDIA's own outputs, byte for byte: rank files as whole files, config.json key by key."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.cli import app
from tests.goldens.differences import check_config
from tests.support.places import DATA

DENSE = DATA / "dense"
CASES = {
    case["case"]: case for case in json.loads((DENSE / "cases.json").read_text()) if (DENSE / "expected" / case["case"]).exists()
}

# The reference of 0.17 gave every pipeline stage `layers // stages` layers and lost the rest: of 3 layers on 2 stages, the last.
# TensorRT-LLM 1.2.1 expects the first stages to have one more, and does not load that output.
LOSES_A_LAYER = "mha_tp2pp2"
# The reference leaves the MLP's biases out, which TensorRT-LLM's class has.
LOSES_BIASES = "bias_gqa_tp4"


def run(case: str, output: Path, *more: str) -> None:
    flag, model, *arguments = shlex.split(CASES[case]["arguments"])
    arguments = [flag, str(DENSE / model), *arguments]
    result = CliRunner().invoke(app, ["convert", *arguments, "--output_dir", str(output), "--quiet", *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("scheduler", ["threads", "local"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in (LOSES_A_LAYER, LOSES_BIASES)])
def test_output_equals_the_reference(case: str, scheduler: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(case, output, "--scheduler", scheduler)
    expected = DENSE / "expected" / case
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()} | {"headrace.json"}
    for path in expected.glob("*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    check_config(f"dense/{case}", output)


def test_biases_of_the_mlp_are_there_and_nothing_else_is_different(tmp_path: Path) -> None:
    output, expected = tmp_path / "out", DENSE / "expected" / LOSES_BIASES
    run(LOSES_BIASES, output, "--scheduler", "threads")
    check_config(f"dense/{LOSES_BIASES}", output)
    model = DENSE / "models" / CASES[LOSES_BIASES]["model"]
    config, source = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    # Hugging Face's projection, and whether its bias is cut with its rows: that of `proj` is whole on every rank.
    origins = {"fc": ("gate_proj", True), "gate": ("up_proj", True), "proj": ("down_proj", False)}
    for rank in range(4):
        ours, theirs = (load_file(place / f"rank{rank}.safetensors") for place in (output, expected))
        more = {name: ours.pop(name) for name in sorted(set(ours) - set(theirs))}
        assert list(ours) == list(theirs)
        assert all(same(ours[name], theirs[name]) for name in theirs)
        wanted = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (origin, cut) in origins.items():
                bias = source[f"model.layers.{layer}.mlp.{origin}.bias"]
                wanted[f"transformer.layers.{layer}.mlp.{name}.bias"] = bias.chunk(4)[rank] if cut else bias
        assert more.keys() == wanted.keys()
        assert all(same(more[name], wanted[name]) for name in wanted)


def test_biases_of_the_mlp_are_left_out_where_asked(tmp_path: Path) -> None:
    output, expected = tmp_path / "out", DENSE / "expected" / LOSES_BIASES
    run(LOSES_BIASES, output, "--scheduler", "threads", "--mlp_bias", "omit")
    for path in expected.iterdir():
        if path.suffix == ".safetensors":
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (output, expected))
    assert list(ours.items()) == list(theirs.items())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_uneven_pipeline_stages_keep_every_layer(tmp_path: Path) -> None:
    output, expected = tmp_path / "out", DENSE / "expected" / LOSES_A_LAYER
    run(LOSES_A_LAYER, output, "--scheduler", "threads")
    check_config(f"dense/{LOSES_A_LAYER}", output)
    source = safe_open(DENSE / "models" / CASES[LOSES_A_LAYER]["model"] / "model.safetensors", "pt")
    # rank, local layer -> layer of the model: three layers on two stages are two and one.
    homes = {(0, 0): 0, (0, 1): 1, (2, 0): 2}
    for (rank, local), layer in homes.items():
        with safe_open(output / f"rank{rank}.safetensors", "pt") as ours:
            for name, origin in (("post_layernorm", "post_attention_layernorm"), ("input_layernorm", "input_layernorm")):
                wanted = source.get_tensor(f"model.layers.{layer}.{origin}.weight")
                assert ours.get_tensor(f"transformer.layers.{local}.{name}.weight").equal(wanted)
    # What the reference did write, the first stage's first layer and all outside the layers, is the same.
    for rank in range(4):
        with (
            safe_open(output / f"rank{rank}.safetensors", "pt") as ours,
            safe_open(expected / f"rank{rank}.safetensors", "pt") as theirs,
        ):
            for name in theirs.keys():  # noqa: SIM118
                if "layers." not in name or rank < 2:
                    assert ours.get_tensor(name).equal(theirs.get_tensor(name)), name
