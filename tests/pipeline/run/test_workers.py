"""What every worker elsewhere must be and see, on real workers, in a mount namespace of their own where it matters."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import Interrupted, convert, plan
from pipeline.errors import BadInput, SourceChanged
from pipeline.planning.plans import Plan
from pipeline.run import looking, workers
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.support import checkpoints
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.range_server import range_server

Start = Callable[[str], str]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Start]:
    """Starts a scheduler with one worker, which first runs the shell commands that are given; gives its address."""
    from distributed import Client

    with ExitStack() as stack:

        def start(before: str = "true") -> str:
            file = tmp_path / f"scheduler-{uuid.uuid4().hex}.json"
            python = shlex.quote(sys.executable)
            words = f"--host 127.0.0.1 --port 0 --no-dashboard --scheduler-file {file}"
            worker = f"--scheduler-file {file} --no-nanny --no-dashboard --local-directory {tmp_path / 'dask'}"
            user = ["--map-root-user"] if os.geteuid() else []
            for shell in (
                ["sh", "-c", f"exec {python} -m distributed.cli.dask_scheduler {words}"],
                ["unshare", "--mount", *user, "sh", "-c", f"{before} && exec {python} -m distributed.cli.dask_worker {worker}"],
            ):
                process = subprocess.Popen(shell, stderr=subprocess.DEVNULL)
                stack.callback(lambda process=process: (process.kill(), process.wait()))
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(1, timeout=30)
                return str(client.scheduler.address)

        yield start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def test_a_worker_that_sees_all_of_it_converts_and_no_probe_is_left(tmp_path: Path, model: Path, cluster: Start) -> None:
    convert(model_dir=model, output_dir=tmp_path / "out", tp_size=2, scheduler=cluster("true"))
    convert(model_dir=model, output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not list(tmp_path.rglob(f"{looking.PROBE}*"))


@pytest.mark.parametrize("hidden", ["model", "ranks"])
def test_what_a_worker_does_not_see_is_refused_before_anything_is_written(
    tmp_path: Path, model: Path, cluster: Start, hidden: str
) -> None:
    (tmp_path / "ranks").mkdir()
    address = cluster(f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / hidden))}")
    with pytest.raises(BadInput, match="one file system that all workers see") as caught:
        convert(model_dir=model, output_dir=tmp_path / "ranks/out", scheduler=address)
    place = model / "config.json" if hidden == "model" else tmp_path / "ranks"
    assert f"{place}: No such file or directory" in str(caught.value)
    assert list((tmp_path / "ranks").iterdir()) == []


def test_a_source_at_a_url_is_asked_for_by_each_worker_itself(
    tmp_path: Path, cluster: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process keeps of it no worker sees."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    model = tmp_path / "served/m"
    checkpoints.write(model, checkpoints.LLAMA)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text(json.dumps(name))
    options: dict[str, Any] = {"tp_size": 2, "copy_tokenizer": True}
    with range_server(tmp_path / "served") as served:
        address = cluster(f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / 'cache'))}")
        convert(model_dir=f"{served.url}/m", output_dir=tmp_path / "out", scheduler=address, **options)
    convert(model_dir=model, output_dir=tmp_path / "alone", scheduler="threads", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert "tokenizer.json" in contents(tmp_path / "out")


def on_its_own_disk(tmp_path: Path, change: str = "true") -> str:
    """Commands that put a copy of the model in its place, with times of its own, behind a command that changes it."""
    model, copy = shlex.quote(str(tmp_path / "model")), shlex.quote(str(tmp_path / "copy"))
    return f"cp -r {model} {copy} && {change} && mount --bind {copy} {model}"


def test_a_worker_may_have_a_copy_of_the_source_on_its_own_disk(tmp_path: Path, model: Path, cluster: Start) -> None:
    address = cluster(on_its_own_disk(tmp_path, f"touch -d 2001-01-01 {shlex.quote(str(tmp_path))}/copy/*"))
    convert(model_dir=model, output_dir=tmp_path / "out", tp_size=2, scheduler=address)
    convert(model_dir=model, output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_copy_that_changes_while_it_is_read_is_an_error(tmp_path: Path, model: Path, cluster: Start) -> None:
    class Changing(Silent):
        def started(self, *_: Any) -> None:
            (tmp_path / "copy/model.safetensors").touch()

    with pytest.raises(SourceChanged, match="written to since"):
        convert(model_dir=model, output_dir=tmp_path / "out", scheduler=cluster(on_its_own_disk(tmp_path)), listener=Changing())
    assert not (tmp_path / "out").exists()


def test_a_worker_with_other_weights_of_the_same_sizes_is_refused(tmp_path: Path, model: Path, cluster: Start) -> None:
    """As an older fine-tune has them: all names, shapes and sizes are the same."""
    checkpoints.write(tmp_path / "other", checkpoints.LLAMA, seed=1)
    theirs, mine = (tmp_path / name / "model.safetensors" for name in ("other", "model"))
    assert theirs.stat().st_size == mine.stat().st_size
    address = cluster(f"mount --bind {shlex.quote(str(theirs))} {shlex.quote(str(mine))}")
    with pytest.raises(BadInput, match="other weights under the same header"):
        plan(model_dir=model, output_dir=tmp_path / "out", scheduler=address)
    with pytest.raises(BadInput, match="or copies of the same files"):
        convert(model_dir=model, output_dir=tmp_path / "out", scheduler=address)
    assert not (tmp_path / "out").exists()


class Client:
    """Answers for a worker."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def run(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"tcp://w:1": self.answer}


def test_another_version_and_no_headrace_are_named(tmp_path: Path) -> None:
    mine = looking.versions()
    asked = looking.Question(mine, workers.MEASURING)
    installed = {**mine, "torch": "2.4", "transformers": "5.0"}
    said = {"host": "w", "name": "n", "versions": {**installed, "headrace": "0.0.9"}, "source": [], "unseen": {}}
    (wrong,), _ = workers.ask(Client(said), asked, set())
    assert f"headrace 0.0.9, dask {mine['dask']}" in str(wrong)
    assert "Install the same versions" in str(wrong)
    (silent,), _ = workers.ask(Client(ModuleNotFoundError("No module named 'pipeline'")), asked, set())
    assert "no answer (ModuleNotFoundError: No module named 'pipeline')" in str(silent)
    (lacking,), _ = workers.ask(Client({**said, "versions": {**installed, "transformers": ""}}), asked, set())
    assert "found no transformers; expected torch and transformers" in str(lacking)
    # It says that it wrote an answer, and nobody here sees it.
    fine, unseen = workers.ask(Client({**said, "versions": installed}), asked, {tmp_path / "out"})
    assert fine == []
    assert "a file that it wrote there is not seen here" in str(unseen[tmp_path / "out"][0])


@pytest.fixture
def hiding(tmp_path: Path, model: Path, cluster: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a cluster whose worker sees another directory in the place of `ranks`, in which outputs go."""
    monkeypatch.setenv("FSSPEC_LOCAL", '{"auto_mkdir": true}')  # as buckets have no directories
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": True})
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    (tmp_path / "ranks").mkdir()
    convert(model_dir=model, output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    return lambda before="": cluster(before or f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / 'ranks'))}")


def request(tmp_path: Path, scratch: str = "", **more: Any) -> dict[str, Any]:
    """A conversion into `ranks`, whose scratch is a bucket or a directory that all see, or where it usually is."""
    places = {"bucket": f"local://{tmp_path}/bucket", "directory": str(tmp_path / "shared")}
    own = {"scratch": places[scratch]} if scratch else {}
    return {"model_dir": tmp_path / "model", "output_dir": tmp_path / "ranks/out", "tp_size": 2, **own, **more}


class Noting(Silent):
    """Notes what a run says when it starts, and how much of it was done; stops it after so many groups."""

    def __init__(self, after: int = 10**9) -> None:
        self.after, self.notes, self.done_tasks = after, list[str](), 0

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:  # noqa: ARG002
        self.notes, self.done_tasks = list(plan.notes), done_tasks

    def advanced(self, written: Written) -> None:  # noqa: ARG002
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


CHOSEN = "rank files are written by this process, from the scratch after shard that the workers write"


@pytest.mark.parametrize("scratch", ["bucket", "directory"])
def test_ranks_that_workers_do_not_see_are_assembled_of_scratch_that_they_see(tmp_path: Path, hiding: Start, scratch: str) -> None:
    asked = request(tmp_path, scratch, scheduler=hiding(""))
    made = plan(**asked)
    assert f"{CHOSEN}: some workers do not see their place" in made.notes
    assert "as workers do not see the outputs' place" in made.scratch_reasons["shard"]
    assert [phase.name for phase in made.phases] == ["scratch after shard", "write"]
    assert made.scratch[0].local_bytes == (0 if scratch == "bucket" else made.scratch[0].size_bytes)
    listener = Noting()
    convert(**asked, listener=listener)
    assert any(note.startswith(CHOSEN) for note in listener.notes)
    assert contents(tmp_path / "ranks/out") == contents(tmp_path / "alone")
    assert any(note.startswith(CHOSEN) for note in json.loads((tmp_path / "ranks/out/headrace.json").read_text())["notes"])
    assert list(tmp_path.rglob("c")) == [], "scratch is removed after success"
    assert not list(tmp_path.rglob(f"{looking.PROBE}*"))
    with pytest.raises(BadInput, match="rank files that this process assembles"):
        plan(**asked, overwrite=True, engine={})


def test_without_scratch_that_all_see_the_one_option_to_add_is_named(tmp_path: Path, hiding: Start) -> None:
    address = hiding("")
    words = ["--model_dir", str(tmp_path / "model"), "--output_dir", str(tmp_path / "ranks/out"), "--scheduler", address]
    for command in ("plan", "convert"):
        ran = headrace(command, *words)
        assert ran.code == 2
        assert "Give --scratch s3://bucket/prefix" in ran.err
        assert ran.err.count("--scratch") == 1
        assert "--scratch_after" not in ran.err
    assert list((tmp_path / "ranks").iterdir()) == []


@pytest.mark.parametrize("scratch", ["bucket", "directory"])
@pytest.mark.parametrize("stopped", ["as scratch is filled", "as ranks are assembled"])
def test_a_run_that_began_to_assemble_goes_on_though_workers_see_the_ranks_now(
    tmp_path: Path, hiding: Start, scratch: str, stopped: str
) -> None:
    asked = request(tmp_path, scratch, scheduler=hiding(""))
    filled = len(plan(**asked).phases[0].groups)
    with pytest.raises(Interrupted):
        convert(**asked, listener=Noting(3 if stopped == "as scratch is filled" else filled + 2))
    listener = Noting()
    convert(**request(tmp_path, scratch, scheduler=hiding("true")), listener=listener)
    assert listener.done_tasks > 0
    assert any(note.startswith(CHOSEN) for note in listener.notes)
    assert contents(tmp_path / "ranks/out") == contents(tmp_path / "alone")


def test_a_run_whose_workers_see_the_ranks_no_more_begins_anew_and_says_so(tmp_path: Path, hiding: Start) -> None:
    with pytest.raises(Interrupted):
        convert(**request(tmp_path, "bucket", scheduler=hiding("true")), listener=Noting(3))
    listener = Noting()
    convert(**request(tmp_path, "bucket", scheduler=hiding("")), listener=listener)
    assert f"{tmp_path / 'ranks/out'} is begun anew: an earlier run of it went through other cuts" in listener.notes
    assert contents(tmp_path / "ranks/out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("hides", [False, True])
def test_scratch_that_a_plan_does_not_use_is_not_looked_at(
    tmp_path: Path, hiding: Start, monkeypatch: pytest.MonkeyPatch, hides: bool
) -> None:
    """As beside an output whose parent nobody can write to."""
    asked, real = set[Path](), workers.ask

    def noting(client: Any, question: looking.Question, places: set[Path]) -> Any:
        asked.update(places)
        return real(client, question, places)

    monkeypatch.setattr(workers, "ask", noting)
    (tmp_path / "ranks/out").mkdir()
    convert(**request(tmp_path, "directory", scheduler=hiding("" if hides else "true")))
    assert asked == {tmp_path / "ranks/out", *([tmp_path / "shared"] if hides else [])}


def test_ranks_that_need_scratch_which_cannot_be_written_are_refused(
    tmp_path: Path, hiding: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = looking.write_probe

    def denied(file: Path, token: str) -> None:
        if file.parent == tmp_path:  # beside `ranks`, where the directory of scratch would be made
            raise PermissionError(13, "Permission denied", str(file))
        real(file, token)

    monkeypatch.setattr(workers, "write_probe", denied)
    with pytest.raises(BadInput, match=r"Permission denied; .*Give --scratch s3://bucket/prefix"):
        convert(**request(tmp_path, "directory", scheduler=hiding("")))
    assert list((tmp_path / "ranks").iterdir()) == []


def test_a_plan_whose_scheduler_does_not_answer_says_what_it_does_not_know(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.2)
    asked = {"model_dir": model, "output_dir": tmp_path / "out"}
    made = plan(**asked, scheduler="tcp://127.0.0.1:1")
    assert "whether the workers see all files is tried by convert: tcp://127.0.0.1:1 does not answer" in made.notes
    made = plan(**asked, cluster={"class": "distributed.LocalCluster"})
    assert "whether the workers see all files is tried by convert: the cluster is started for the run" in made.notes
