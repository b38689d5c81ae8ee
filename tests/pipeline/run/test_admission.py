"""Workers that come while a run is under way: asked as they come, and given no task where they are not as they must be."""

from __future__ import annotations

import asyncio
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import WriteFailed, convert
from pipeline.run import admission
from pipeline.run.admission import Admission
from pipeline.run.looking import Question, versions
from pipeline.sinks.journal import Journal, first_line
from pipeline.watching.listener import Silent
from tests.support import checkpoints
from tests.support.dask_processes import DaskProcesses
from tests.support.directories import contents


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


class Apart:
    """Places in which a process runs some commands first, in a mount namespace of its own."""

    def __init__(self, before: str) -> None:
        self.before = before

    def address(self, name: str) -> str:  # noqa: ARG002
        return "127.0.0.1"

    def inside(self, name: str) -> tuple[str, ...]:
        user = ["--map-root-user"] if os.geteuid() else []
        return ("unshare", "--mount", *user, "sh", "-c", f'{self.before} && exec "$@"', "sh") if name == "late" else ()


class Late(Silent):
    """Starts a worker when a run has begun."""

    def __init__(self, cluster: DaskProcesses) -> None:
        self.cluster = cluster

    def started(self, *_: object) -> None:
        threading.Thread(target=lambda: self.cluster.start_worker("late")).start()


@pytest.mark.parametrize("hidden", ["model", "ranks", "nothing"])
def test_a_worker_that_comes_later_is_asked_before_its_first_task(
    tmp_path: Path, model: Path, stack: ExitStack, hidden: str
) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "nothing").mkdir()
    apart: Any = Apart(f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / hidden))}")
    cluster = DaskProcesses(tmp_path, stack, apart)
    asked: dict[str, Any] = {"model_dir": model, "output_dir": tmp_path / "ranks/out", "scheduler": cluster.address}
    if hidden == "nothing":
        convert(**asked, listener=Late(cluster))
        convert(**asked | {"output_dir": tmp_path / "alone", "scheduler": "threads"})
        assert contents(tmp_path / "ranks/out") == contents(tmp_path / "alone")
        return
    said = r"model/config\.json: No such file" if hidden == "model" else r"does not see .*headrace\.json\.partial"
    with pytest.raises(WriteFailed, match=f"{said}.* run the same command again"):
        convert(**asked, listener=Late(cluster))
    names = {path.name for path in (tmp_path / "ranks/out").iterdir()}
    assert names == {"headrace.json.partial", "rank0.safetensors.partial"}, "as of any run that may go on"


def told(question: Question, marks: dict[str, bytes]) -> Admission:
    plugin = Admission(question, marks, "here")
    asyncio.run(plugin.setup(SimpleNamespace(address="tcp://w:1")))
    return plugin


def test_a_later_worker_of_another_version_is_given_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    told(Question(versions()), {}).check()
    other = told(Question({**versions(), "headrace": "0.0.9"}), {})
    with pytest.raises(WriteFailed, match=r"expected headrace 0\.0\.9, .*run the same command again"):
        other.check()
    worker = SimpleNamespace(address="tcp://w:1", plugins={"a run": other})
    monkeypatch.setattr(admission, "get_worker", lambda: worker)
    with pytest.raises(WriteFailed, match="Install the same versions"):
        admission.check_admitted("a run")
    with pytest.raises(WriteFailed, match="or the run has ended"):
        admission.check_admitted("another run")


def test_no_task_of_a_run_begins_where_another_job_is_at_work_by_now(tmp_path: Path) -> None:
    path = tmp_path / "headrace.json.partial"
    journal = Journal(path)
    journal.start({"id": "one"})
    plugin = told(Question(versions()), {str(path): first_line(str(path))})
    plugin.check()
    journal.append({"done": [1], "sums": []})
    plugin.check()
    journal.start({"id": "two"})
    with pytest.raises(WriteFailed, match="another job's by now"):
        plugin.check()
    journal.remove()
    plugin.check()  # as its output is whole
    assert "does not see" in told(Question(versions()), plugin.marks).refusal
    (tmp_path / "config.json").touch()
    assert told(Question(versions()), plugin.marks).refusal == ""


def test_a_run_leaves_nothing_with_the_cluster(tmp_path: Path, model: Path, stack: ExitStack) -> None:
    from distributed import Client

    cluster = DaskProcesses(tmp_path, stack)
    cluster.start_worker("one")
    convert(model_dir=model, output_dir=tmp_path / "out", scheduler=cluster.address)
    with Client(cluster.address, set_as_default=False) as client:
        plugins = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.worker_plugins))
        (more,) = client.run(lambda dask_worker: list(dask_worker.plugins)).values()
    assert not [name for name in (*plugins, *more) if name.startswith("headrace")]
