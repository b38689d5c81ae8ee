"""`headrace plan` is a gate: it exits as `convert` would, after what would stop it, what is done, and how long it may take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import stages.write
from pipeline import WriteFailed, plan
from pipeline import convert as convert_now
from pipeline.run.execute import execute
from pipeline.run.foresee import done_tasks, foresee
from pipeline.sinks.hold import Holder
from tests.support import checkpoints
from tests.support.commands import Ran, convert, headrace, tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def planned(model: Path, *more: object, output: str = "out") -> Ran:
    return headrace("plan", "--model_dir", model, "--output_dir", model.parent / output, "--scheduler", "threads", *more)


def interrupt_after(writes: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert until a disk fails at a write of this number."""
    whole, count = stages.write._write_all, iter(range(10**9))

    def fail(descriptor: int, data: memoryview, offset: int) -> None:
        if next(count) == writes:
            raise OSError(5, "Input/output error", "disk")
        whole(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(stages.write, "_write_all", fail)
        with pytest.raises(WriteFailed):
            convert_now(**options)


def test_the_verdict_is_first(model: Path) -> None:
    ran = planned(model)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("would convert in ")
    second = ran.out.splitlines()[1]
    assert second.startswith("about ")
    assert "an estimate by trying the work for" in second
    assert json.loads(planned(model, "--json").out)["estimated_seconds"] > 0


def test_a_finished_output(model: Path) -> None:
    assert convert(model, model.parent / "out").code == 0
    ran = planned(model)
    assert (ran.code, ran.out.splitlines()[0]) == (0, "would do nothing: up to date")
    assert json.loads(planned(model, "--json").out)["estimated_seconds"] is None


def test_other_options_are_named_with_both_values(model: Path) -> None:
    assert convert(model, model.parent / "out", "--tp_size", 4).code == 0
    before = tree(model.parent)
    ran, said = planned(model, "--tp_size", 2, "--dtype", "bfloat16"), planned(model, "--json")
    assert (ran.code, said.code) == (2, 2)
    assert ran.out.splitlines()[0] == "would not convert: 1 problem"
    assert "dtype auto (asked: bfloat16), tp_size 4 (asked: 2)" in " ".join(ran.out.split())
    assert "tp_size 4 (asked: 1)" in json.loads(said.out)["obstacles"][0]
    assert convert(model, model.parent / "out").code == 2
    assert tree(model.parent) == before


def test_another_source_is_named(model: Path) -> None:
    assert convert(model, model.parent / "out").code == 0
    checkpoints.write(model.parent / "second", checkpoints.LLAMA, seed=1)
    assert f"a finished conversion of another source, {model}" in " ".join(planned(model.parent / "second").out.split())
    checkpoints.write(model, checkpoints.LLAMA, seed=2)
    assert "of this source as it was before its files changed" in " ".join(planned(model).out.split())


def test_a_disk_without_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", lambda _: 1000)
    ran = planned(model)
    assert ran.code == convert(model, model.parent / "out").code == 2
    assert ran.out.splitlines()[0] == "would not convert: 1 problem"
    assert "1000 B free; expected room for " in " ".join(ran.out.split())
    assert planned(model, "--json").code == 2


def test_another_job_at_work(model: Path) -> None:
    output = model.parent / "out"
    output.mkdir()
    (output / "headrace.json.partial").touch()
    other = Holder("elsewhere", "another boot", 12, "x")
    (output / "headrace.json.lock").symlink_to(json.dumps(other.__dict__))
    ran = planned(model)
    assert ran.code == convert(model, output).code == 2
    assert "another job at work on it, process 12 on elsewhere" in " ".join(ran.out.split())
    (output / "headrace.json.lock").unlink()
    assert planned(model).code == 0


def test_an_engine_that_would_be_refused(model: Path) -> None:
    (model.parent / "job.toml").write_text("model_dir = 'model'\noutput_dir = 'out'\n[engine]\nmax_batch = 8\n")
    ran = headrace("plan", model.parent / "job.toml")
    assert ran.code == 2
    assert "would not convert: 2 problems" in ran.out
    assert "engine.max_batch: found an option that trtllm-build does not have" in " ".join(ran.out.split())
    assert "no trtllm-build on PATH" in " ".join(ran.out.split())


@pytest.mark.parametrize("cuts", ["none", "unpack"])
def test_what_an_interrupted_run_has_done(model: Path, cuts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"model_dir": model, "output_dir": model.parent / "out", "tp_size": 2, "scheduler": "synchronous"}
    options |= {"scratch_after": cuts}
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    assert done_tasks(plan(**options)) == 0
    interrupt_after(60, options, monkeypatch)
    before = tree(model.parent)
    outlook = foresee(plan(**options))
    words = ("--model_dir", model, "--output_dir", model.parent / "out", "--tp_size", 2, "--scratch_after", cuts)
    ran = headrace("plan", *words, "--scheduler", "synchronous")
    assert tree(model.parent) == before, "a look changes nothing"
    assert 0 < outlook.done_tasks < outlook.tasks
    assert ran.out.startswith(f"would resume: {outlook.done_tasks} of {outlook.tasks} tasks done")
    assert done_tasks(plan(**options, overwrite=True)) == 0
    assert execute(plan(**options)).resumed_tasks == outlook.done_tasks


@pytest.mark.parametrize("typed", ["out", "./deep/out", "../here/out"])
def test_relative_paths_are_printed_as_they_were_typed(model: Path, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "here").mkdir()
    monkeypatch.chdir(model.parent / "here")
    words = ("--model_dir", "../model", "--output_dir", typed, "--scheduler", "threads")
    said = [headrace("plan", *words), headrace("convert", *words), headrace("convert", *words)]
    assert [ran.code for ran in said] == [0, 0, 0]
    assert all(typed in ran.out for ran in said)
    assert all(str(model.parent) not in ran.out for ran in said)
    refused = headrace("convert", *words, "--tp_size", 2)
    assert f"--output_dir {typed}: found a finished conversion with tp_size 1 (asked: 2)" in refused.err


def test_all_files_are_in_the_table(model: Path) -> None:
    ran = convert(model, model.parent / "out")
    assert all(any(name in line for line in ran.out.splitlines()) for name in ("rank0.safetensors", "config.json", "headrace.json"))
