"""NVIDIA's own outputs, byte for byte: rank files as whole files, config.json key by key."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from pipeline.cli import app
from tests.support.places import DATA

DENSE = DATA / "dense"
CASES = {
    case["case"]: case for case in json.loads((DENSE / "cases.json").read_text()) if (DENSE / "expected" / case["case"]).exists()
}

# The reference of 0.17 gave every pipeline stage `layers // stages` layers and lost the rest: of 3 layers on 2 stages, the last.
# TensorRT-LLM 1.2.1 expects the first stages to have one more, and does not load that output.
LOSES_A_LAYER = "mha_tp2pp2"


def run(case: str, output: Path, *more: str) -> None:
    flag, model, *arguments = shlex.split(CASES[case]["arguments"])
    arguments = [flag, str(DENSE / model), *arguments]
    result = CliRunner().invoke(app, ["convert", *arguments, "--output_dir", str(output), "--quiet", *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("scheduler", ["threads", "local"])
@pytest.mark.parametrize("case", [case for case in CASES if case != LOSES_A_LAYER])
def test_output_equals_the_reference(case: str, scheduler: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(case, output, "--scheduler", scheduler)
    expected = DENSE / "expected" / case
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()} | {"headrace.json"}
    for path in expected.glob("*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    ours, theirs = json.loads((output / "config.json").read_text()), json.loads((expected / "config.json").read_text())
    assert ours == theirs
    assert list(ours) == list(theirs)


def test_uneven_pipeline_stages_keep_every_layer(tmp_path: Path) -> None:
    output, expected = tmp_path / "out", DENSE / "expected" / LOSES_A_LAYER
    run(LOSES_A_LAYER, output, "--scheduler", "threads")
    assert json.loads((output / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
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
