"""`headrace inspect`: problems of a checkpoint are said beside its facts, and where it cannot be opened it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support import checkpoints
from tests.support.checkpoints import LLAMA
from tests.support.commands import headrace, tree
from tests.support.inspections import facts, inspected, table


def problems_of(path: Path) -> list[str]:
    """The problems that are said of a checkpoint that can be opened: alike as JSON and in the table, and no failure."""
    said = inspected(path)["problems"]
    shown = " ".join(table(path).get("problem", [])).replace(" ", "")
    assert all(problem.replace(" ", "") in shown for problem in said[:20])
    assert said, "a problem"
    return said


def test_an_unknown_architecture(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", {**LLAMA, "architectures": ["GPT2LMHeadModel"]})
    said = inspected(tmp_path / "model")
    assert (said["family"], said["architecture"]) == (None, "GPT2LMHeadModel")
    assert {name: said[name] for name in facts(source)} == facts(source)
    assert "model" not in said
    (problem,) = problems_of(tmp_path / "model")
    assert "architecture: found GPT2LMHeadModel; expected one of AquilaForCausalLM, " in problem
    assert table(tmp_path / "model")["family"] == ["unknown (GPT2LMHeadModel)"]


def test_a_configuration_that_is_wrong(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", LLAMA)
    wrong = {**LLAMA, "vocab_size": "many", "num_hidden_layers": 0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrong))
    found = problems_of(tmp_path / "model")
    assert len(found) == 2
    assert any("vocab_size: found 'many'" in problem for problem in found)
    assert any("num_hidden_layers: found 0" in problem for problem in found)


def test_a_tensor_that_nothing_consumes(tmp_path: Path) -> None:
    tensors = {**checkpoints.values(LLAMA), "model.visual.weight": np.zeros(4, np.float16)}
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    (problem,) = problems_of(tmp_path / "model")
    assert problem.startswith("model.visual.weight: found a tensor that belongs nowhere")


def test_very_many_problems(tmp_path: Path) -> None:
    tensors = {**checkpoints.values(LLAMA), **{f"extra.x{n}.weight": np.zeros(4, np.float16) for n in range(30)}}
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    assert len(problems_of(tmp_path / "model")) == 30
    shown = table(tmp_path / "model")["problem"]
    assert len(shown) == 20
    assert shown[-1].endswith("... and 10 more")


def test_a_missing_tensor_and_one_of_another_shape(tmp_path: Path) -> None:
    tensors = checkpoints.values(LLAMA)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = np.zeros((95, 64), np.float16)
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    found = problems_of(tmp_path / "model")
    assert any(problem.startswith("model.norm.weight: found no such tensor") for problem in found)
    assert any(problem.startswith("lm_head.weight: found shape [95, 64]; expected [96, 64]") for problem in found)


def test_a_quantization_that_headrace_does_not_know(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**LLAMA, "quantization_config": {"quant_method": "nonsense"}})
    assert inspected(tmp_path / "model")["quantization"] == "nonsense"
    assert table(tmp_path / "model")["quantization"] == ["nonsense"]
    assert inspected(tmp_path / "model")["problems"] == []  # all its tensors are numbers


@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["table", "json"])
@pytest.mark.parametrize(
    "name", ["gone", "empty", "blank", "x" * 300, "no weights", "no configuration", "damaged", "a missing shard", "damaged.gguf"]
)
def test_what_cannot_be_opened_is_refused(name: str, json_: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name in ("blank", "damaged.gguf"):
        path.write_bytes(b"GGUF" if name == "damaged.gguf" else b"")
    elif len(name) < 100 and name != "gone":
        checkpoints.write(path, LLAMA, shards=2 if "shard" in name else 1)
        file = {"no configuration": "config.json", "a missing shard": "model-00002-of-00002.safetensors"}.get(
            name, "model.safetensors"
        )
        (path / file).unlink()
        if name == "damaged":
            (path / file).write_bytes(b"no weights")
    before = tree(tmp_path)
    ran = headrace("inspect", path, *json_)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert ran.err.startswith("headrace: 1 problem")
    assert str(path) in ran.err
    assert tree(tmp_path) == before
