"""The commands on outputs: lines of progress where there is no terminal, and a source that is taken for an output."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pipeline.cli import verify
from pipeline.cli.levels import Lines
from tests.support import checkpoints
from tests.support.commands import convert, headrace, one, refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@pytest.mark.parametrize("command", ["verify", "report"])
def test_lines_where_there_is_no_terminal(model: Path, command: str) -> None:
    assert convert(model, model.parent / "out").code == 0
    ran = headrace(command, model.parent / "out", "--source", model)
    assert ran.code == 0
    lines = ran.err.splitlines()
    assert all(re.fullmatch(r"(integrity|round trip): \d+ %(, \d+ s left)?", line) for line in lines)
    assert {"integrity: 100 %", "round trip: 100 %"} <= set(lines)


def test_quiet_and_json_print_no_lines(model: Path) -> None:
    assert convert(model, model.parent / "out").code == 0
    assert headrace("verify", model.parent / "out", "--quiet").err == ""
    assert headrace("verify", model.parent / "out", "--json").err == ""


def test_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at the beginning, at the end, and every two seconds between."""
    now = iter(range(1000))
    monkeypatch.setattr("pipeline.cli.levels.time.monotonic", lambda: next(now) / 10)
    lines = Lines()
    for done in range(101):
        lines("tokens", done, 100)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "tokens: 0 %"
    assert said[1] == "tokens: 20 %, 8 s left"
    assert said[-1] == "tokens: 100 %"
    assert len(said) == 6


@pytest.mark.parametrize("command", ["verify", "report", "generate", "build"])
def test_a_source_is_no_output(model: Path, command: str) -> None:
    more = {"generate": ("--prompt", "x"), "build": ("--output_dir", model.parent / "engine")}.get(command, ())
    ran = headrace(command, model, *more)
    assert (ran.code, ran.out) == (2, "")
    assert "found a Hugging Face checkpoint (LlamaForCausalLM), which is a source" in ran.err
    assert f"headrace convert --model_dir {model} --output_dir ranks" in ran.err
    assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


def test_a_file_that_is_cut_short_is_one_problem(model: Path) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    problem = one(refused(model))
    assert "tensors would end (model.layers." in problem
    assert problem.endswith("The file is damaged or cut short: fetch it again")


def test_a_model_in_the_place_of_a_job_file(model: Path) -> None:
    ran = headrace("convert", model)
    assert ran.code == 2
    assert "found a directory; expected a job file, in TOML. A checkpoint is given by an option: --model_dir" in ran.err


def test_no_lines_stand_amid_a_text_that_goes_to_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        for stream, same in ((out, True), (err, False)):
            monkeypatch.setattr(sys, "stderr", stream)
            assert verify._one_place() is same
