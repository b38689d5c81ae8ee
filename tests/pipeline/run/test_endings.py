"""The end of a run that fails or is stopped while tasks are at work: nothing is unlocked or removed under them, nor twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import stages.write
from pipeline import Interrupted, convert, plan
from pipeline.errors import BadInput, Problem
from pipeline.run import execute, schedulers, threads
from pipeline.run.schedulers import runner
from pipeline.sinks.journal import Journal
from pipeline.sinks.output import JOURNAL
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.support import checkpoints
from tests.support.witness import wait

WRONG = BadInput([Problem("a tensor", "NaN", "a number")])


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA | {"num_hidden_layers": 4})
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    return {"model_dir": tmp_path / "model", "output_dir": tmp_path / "out", "scheduler": "local", "workers": 2}


def works(place: Path) -> None:
    """A task that cannot be stopped."""
    (place / "begun").touch()
    time.sleep(0.7)
    (place / "ended").touch()


def fails(place: Path) -> None:
    wait((place / "begun").exists, 10)
    raise WRONG


@pytest.mark.parametrize("scheduler", ["local", "threads"])
def test_a_failure_is_told_when_the_tasks_that_are_at_work_have_ended(tmp_path: Path, scheduler: str) -> None:
    from dask._task_spec import Task

    graph = {(each.__name__, 0): Task((each.__name__, 0), each, tmp_path) for each in (works, fails)}
    with runner(scheduler, 2) as session:
        with pytest.raises(BadInput):
            list(session.run(graph))
        assert (tmp_path / "ended").exists()


def slow_writes(monkeypatch: pytest.MonkeyPatch, output: Path, locked: list[bool]) -> threading.Event:
    """Have all threads but the first that writes write slowly, once, and note whether the output was locked at the end of that."""
    begun, first, written = threading.Event(), list[int](), stages.write._write_all

    def write_all(*own: Any) -> None:
        written(*own)
        first.append(threading.get_ident())
        if threading.get_ident() != first[0] and not begun.is_set():
            begun.set()
            time.sleep(1.5)
            try:
                Journal(output / JOURNAL).close()
                locked.append(False)
            except BadInput:
                locked.append(True)

    monkeypatch.setattr(stages.write, "_write_all", write_all)
    return begun


class Raising(Silent):
    """Ends a run when a task has been done and another is at work."""

    def __init__(self, begun: threading.Event, error: BaseException) -> None:
        self.begun, self.error = begun, error

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        assert self.begun.wait(30)
        raise self.error


@pytest.mark.parametrize(("scheduler", "seconds"), [("local", 10.0), ("local", 0.0), ("threads", 10.0)])
def test_an_output_is_locked_as_long_as_a_task_writes_to_it(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, scheduler: str, seconds: float
) -> None:
    """Also where a run does not wait for its tasks: the cluster in its process does when it ends."""
    for module in (schedulers, threads):
        monkeypatch.setattr(module, "LEAVING_SECONDS", seconds)
    locked: list[bool] = []
    begun = slow_writes(monkeypatch, asked["output_dir"], locked)
    with pytest.raises(Interrupted):
        convert(**asked | {"scheduler": scheduler}, listener=Raising(begun, KeyboardInterrupt()))
    assert locked == [True]
    Journal(asked["output_dir"] / JOURNAL).close()


@pytest.mark.parametrize("scheduler", ["local", "threads"])
@pytest.mark.parametrize("cut", ["none", "unpack"])
def test_what_a_refusal_removes_is_not_made_again_by_a_task(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cut: str, scheduler: str
) -> None:
    begun = slow_writes(monkeypatch, asked["output_dir"], [])
    with pytest.raises(BadInput):
        convert(**asked | {"scheduler": scheduler}, scratch_after=cut, listener=Raising(begun, WRONG))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_ctrl_c_does_not_wait_for_tasks(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    begun = slow_writes(monkeypatch, asked["output_dir"], [])
    monkeypatch.setattr(schedulers, "_await_end", interrupted)
    with pytest.raises(Interrupted):
        convert(**asked, listener=Raising(begun, KeyboardInterrupt()))


def test_a_job_that_begins_in_the_place_of_a_refused_one_keeps_its_files(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    abandon, output, files = execute.LeftToDo.abandon, asked["output_dir"], list[Path]()

    def abandoned(left: execute.LeftToDo, *own: Any, **more: Any) -> None:
        abandon(left, *own, **more)
        assert not output.exists()
        output.mkdir()  # another job's by now
        Journal(output / JOURNAL).close()
        (output / "rank0.safetensors.partial").write_bytes(b"another's")
        files.extend(sorted(output.iterdir()))

    monkeypatch.setattr(execute.LeftToDo, "abandon", abandoned)
    monkeypatch.setattr(execute._Run, "do", lambda *_: (_ for _ in ()).throw(WRONG))
    with pytest.raises(BadInput):
        execute.execute(plan(**asked))
    assert sorted(output.iterdir()) == files
    assert len(files) == 2
