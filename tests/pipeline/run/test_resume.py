"""Nothing lost: whatever stops a run, the next one goes on and ends with the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.numpy import load_file

import pipeline.sinks.journal
import stages.write
from benchmarks.models import make
from pipeline import BadInput, WriteFailed, convert
from pipeline.sinks.journal import Journal
from pipeline.sinks.scratch import JOURNAL
from tests.pipeline.run.test_interruption import write_sparse
from tests.support import checkpoints
from tests.support.directories import contents

TARGETS = [{"tp_size": 2}, {"tp_size": 1, "pp_size": 3, "dtype": "float32"}]


def job(directory: Path, **options: Any) -> dict[str, Any]:
    tables = [{"output_dir": directory / f"out{n}", **shape} for n, shape in enumerate(TARGETS)]
    return {"model_dir": directory / "model", "target": tables, **options}


def outputs(directory: Path) -> list[dict[str, bytes]]:
    return [contents(directory / f"out{n}") for n in range(len(TARGETS))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and, in out0 and out1, what it converts to."""
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.write(directory / "model", checkpoints.LLAMA)
    convert(**job(directory), scheduler="threads")
    return directory


@pytest.mark.parametrize("after", ["none", "unpack,shard"])
@pytest.mark.parametrize("step", [31, pytest.param(7, marks=pytest.mark.nightly)])
def test_a_failure_at_any_store(tiny: Path, step: int, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    whole, resumed = stages.write._write_all, 0
    for failing in range(0, 400, step):
        count = iter(range(10**9))

        def fail(descriptor: int, data: memoryview, offset: int, count: Any = count, failing: int = failing) -> None:
            if next(count) == failing:
                raise OSError(28, "No space left on device", "somewhere")
            whole(descriptor, data, offset)

        directory = tmp_path / str(failing)
        options = {**job(directory), "model_dir": tiny / "model", "scheduler": "synchronous", "scratch_after": after}
        monkeypatch.setattr(stages.write, "_write_all", fail)
        try:
            convert(**options)
            break
        except WriteFailed as error:
            said = str(error)
        assert "No space left on device (somewhere)" in said
        monkeypatch.setattr(stages.write, "_write_all", whole)
        # Behind a cut after `shard` no task writes to several outputs, so that one may be whole before another.
        there = [(directory / f"out{n}/config.json").exists() for n in range(len(TARGETS))]
        assert not (all(there) if "shard" in after else any(there))
        resumed += convert(**options).resumed_tasks
        assert outputs(directory) == outputs(tiny)
        shutil.rmtree(directory)
    assert failing > 100, "the plan has many stores, and each was made to fail"
    assert resumed > 7 * failing / step, "later runs took up what earlier ones had done, seven tasks and more each"


def test_torn_lines_are_dropped_and_done_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    monkeypatch.setattr(pipeline.sinks.journal.Committer, "commit", _commit_each)
    options = {**job(tmp_path), "model_dir": tiny / "model", "scheduler": "synchronous"}
    _interrupt(options, monkeypatch, after=12)
    path = tmp_path / "out0/headrace.json.partial"
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    assert len(lines) > 8
    for torn in (text[:-5], text[:-1], b"".join(lines[:4]) + b"garbage\n" + b"".join(lines[5:]), lines[0][:20], b""):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / "out0", tmp_path / "again/out0")
        shutil.copytree(tmp_path / "out1", tmp_path / "again/out1")
        (tmp_path / "again/out0/headrace.json.partial").write_bytes(torn)
        result = convert(**{**options, **{"target": job(tmp_path / "again")["target"]}})
        assert result.resumed_tasks <= max(len(torn.splitlines()) - 1, 0)
        assert outputs(tmp_path / "again") == outputs(tiny)


large = partial(make, shape="8B", layers=1, sparse=True)

# What is killed, by its number: what a plan writes to, and who writes.
KILLED = (
    ("--scheduler", "threads"),
    ("--scheduler", "local"),
    ("--scheduler", "threads", "--scratch_after", "unpack"),
)


def _commit_each(self: pipeline.sinks.journal.Committer) -> None:
    """Commit one line a task, so that there are many to tear."""
    waiting, self._waiting = self._waiting, []
    for written in waiting:
        for sink, journal in self.journals.items():
            journal.append(pipeline.sinks.journal.entry([written], sink))


def _interrupt(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    whole, count = stages.write._write_all, iter(range(10**9))

    def fail(descriptor: int, data: memoryview, offset: int) -> None:
        if next(count) == after * 4:
            raise OSError(5, "Input/output error", "disk")
        whole(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(stages.write, "_write_all", fail)
        with pytest.raises(WriteFailed):
            convert(**options)


def test_other_work_is_never_mixed_in(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    options = job(tmp_path, scheduler="synchronous")
    _interrupt(options, monkeypatch, after=5)
    other = {**options, "dtype": "bfloat16", "target": [options["target"][0]]}
    with pytest.raises(BadInput, match=r"unfinished conversion with dtype auto \(asked: bfloat16\)"):
        convert(**other)
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA, seed=9)
    with pytest.raises(BadInput, match="unfinished conversion"):
        convert(**options)
    result = convert(**options, overwrite=True)
    assert result.resumed_tasks == 0
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "fresh", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out0") == contents(tmp_path / "fresh")


def test_one_job_at_a_time(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    held = Journal(tmp_path / "out/headrace.json.partial")
    with pytest.raises(BadInput, match="another job at work"):
        convert(model_dir=tiny / "model", output_dir=tmp_path / "out", scheduler="threads")
    held.close()
    convert(model_dir=tiny / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert contents(tmp_path / "out") == contents(tiny / "out0")


def test_checksums_are_those_of_the_tensors(tiny: Path) -> None:
    for directory in (tiny / "out0", tiny / "out1"):
        sums = json.loads((directory / "headrace.json").read_text())["xxh3"]
        for path in directory.glob("*.safetensors"):
            held = load_file(path)
            assert sums[path.name].keys() == held.keys()
            for name, values in held.items():
                data, parts = values.tobytes(), sums[path.name][name]
                assert sum(nbytes for nbytes, _ in parts) == len(data)
                for nbytes, digest in parts:
                    assert xxhash.xxh3_64_hexdigest(data[:nbytes]) == digest
                    data = data[nbytes:]


@pytest.mark.parametrize(
    ("number", "most", "write"),
    [
        (2, 2, write_sparse),
        *(pytest.param(number, 8, large, marks=pytest.mark.nightly) for number in range(3)),
    ],
)
def test_killed_at_random_moments(number: int, most: int, write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "model")
    script = "import pipeline.sinks.journal as j; j.COMMIT_SECONDS = 0.1\nfrom pipeline.cli import main; main()"
    command = [sys.executable, "-c", script, "convert", "--quiet", "--model_dir", str(tmp_path / "model")]
    command += ["--tp_size", str(2**number), *KILLED[number]]
    reference, output, chance, kills = tmp_path / "reference", tmp_path / "out", random.Random(number), 0
    started = time.monotonic()
    subprocess.run([*command, "--output_dir", str(reference)], check=True)
    seconds = time.monotonic() - started
    while kills < most and seconds > 0.1:
        process = subprocess.Popen([*command, "--output_dir", str(output)])
        try:
            process.wait(timeout=chance.uniform(0.3, 0.8) * seconds)
            if kills:
                break
            shutil.rmtree(output)  # the machine has become faster since the reference was made
            seconds /= 2
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    subprocess.run([*command, "--output_dir", str(output)], check=True)
    for path in reference.iterdir():
        if path.name != "headrace.json":
            assert subprocess.run(["cmp", path, output / path.name], check=False).returncode == 0
    ours, theirs = (json.loads((place / "headrace.json").read_text())["xxh3"] for place in (output, reference))
    assert ours == theirs
    shutil.rmtree(output)
    shutil.rmtree(reference)
    assert kills > 0


def test_a_refusal_at_the_beginning_leaves_what_earlier_runs_did(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job has taken the cut when the outputs are taken up already."""
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    options = {**job(tmp_path), "model_dir": tiny / "model", "scheduler": "synchronous", "scratch_after": "unpack"}
    _interrupt(options, monkeypatch, 30)
    (cut,) = tmp_path.glob("**/*.zarr")
    left = {path: path.read_bytes() for path in tmp_path.glob("out*/*")}
    with closing(Journal(cut / JOURNAL)), pytest.raises(BadInput, match="another job at work on it"):
        convert(**options)
    assert {path: path.read_bytes() for path in tmp_path.glob("out*/*")} == left
    assert convert(**options).resumed_tasks > 0
    assert outputs(tmp_path) == outputs(tiny)
