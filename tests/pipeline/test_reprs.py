"""What the API returns is one line in a shell and a small table in a notebook, and holds no markup or steering of others' texts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import headrace
from tests.support import checkpoints


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a model whose directory is named to do harm."""
    work = tmp_path_factory.mktemp("work")
    model, out = work / "<b>model\x1b[2J\nsecond", work / "ranks"
    checkpoints.write(model, checkpoints.LLAMA)
    plan = headrace.plan(model_dir=model, output_dir=out, tp_size=2)
    result = headrace.convert(model_dir=model, output_dir=out, tp_size=2)
    return {
        "Plan": plan,
        "Result": result,
        "up to date": headrace.convert(model_dir=model, output_dir=out, tp_size=2),
        "Inspection": headrace.inspect(model),
        "VerificationSummary": headrace.verify(out, model),
        "Report": headrace.report(out, page=work / "r.html"),
        "Built": headrace.Built(Path("engine"), 3.2, 5 << 30),
    }


EXPECTED = {
    "Plan": ("ranks: 294.5 KiB in 1 task, at most ", ("source", "output", "reads", "tasks", "memory")),
    "Result": ("ranks: 289.8 KiB written in ", ("output", "read", "written", "seconds", "peak memory", "stages")),
    "up to date": ("ranks: up to date", ("output", "written", "seconds", "peak memory")),
    "Inspection": ("LlamaForCausalLM, ", ("source", "architecture", "type", "size", "files", "tp_size", "convert")),
    "VerificationSummary": ("nothing wrong by integrity, round trip in ", ("output", "source", "found", "integrity", "round trip")),
    "Report": ("r.html: nothing wrong", ("page", "output", "found", "round trip")),
    "Built": ("engine: 5.0 GiB built in 3.2 s", ("engine", "state")),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_line_and_a_table(values: dict[str, Any], name: str) -> None:
    value, (words, labels) = values[name], EXPECTED[name]
    line, table = repr(value), value._repr_html_()
    assert line.startswith(f"<{type(value).__name__} ")
    assert words in line
    assert line.isprintable()
    assert len(line) < 400
    for label in labels:
        assert f">{label}</th>" in table, label
    assert table.startswith("<table>")
    assert "<b>model" not in table
    assert "\x1b" not in table


def test_what_is_wrong_is_in_both(values: dict[str, Any], tmp_path: Path) -> None:
    damaged = shutil.copytree(values["Result"].directories[0], tmp_path / "damaged")
    with (damaged / "rank1.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 0x40]))
    summary = headrace.verify(damaged)
    assert repr(summary).startswith(f"<VerificationSummary {damaged}: 1 finding by integrity in ")
    assert summary.findings[0].subject in summary._repr_html_()
