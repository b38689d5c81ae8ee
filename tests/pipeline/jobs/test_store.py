"""The store: what it takes in and gives back, which files it refuses, and what is left of it after `kill -9`."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import BadInput
from pipeline.jobs import tables
from pipeline.jobs.rows import STATES, RunRow
from pipeline.jobs.store import SERVE, JobStore, default_path, open_store
from tests.pipeline.jobs.stores import Clock, conversion, fresh


def running(store: JobStore, name: str = "a", queue: str = SERVE) -> tuple[RunRow, int]:
    """A run under way, and its attempt."""
    run, _ = store.enqueue(conversion(name), queue, "test")
    attempt = store.claim(run.id, store.register("serve").id)
    assert not isinstance(attempt, frozenset)
    return store.run(run.id), attempt.id


def test_default_path_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "headrace/jobs.db"
    # By the specification a relative path there is to be ignored.
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local/state/headrace/jobs.db"


def test_a_run_from_beginning_to_end(tmp_path: Path) -> None:
    clock = Clock()
    store = fresh(tmp_path, clock)
    run, attempt = running(store)
    assert (run.state, run.attempts, run.started) == ("running", 1, clock.now)
    assert store.began(attempt, os.getpid())
    clock.now += 5
    assert store.heartbeat(store.attempts(run.id)[0].worker, {attempt: (30, 100)}) == frozenset()
    assert (store.run(run.id).bytes_done, store.run(run.id).bytes_total) == (30, 100)
    clock.now += 5
    measured = {
        "seconds": 9.5,
        "bytes_read": 90,
        "bytes_written": 100,
        "peak_memory_bytes": 7,
        "by_stage": {"read": {"seconds": 1.0}},
    }
    assert store.finish(attempt, "done", (100, 100), outcome="done", exit_code=0, **measured)
    run = store.run(run.id)
    assert (run.state, run.ended, run.exit_code, run.bytes_done) == ("done", clock.now, 0, 100)
    (kept,) = store.attempts(run.id)
    assert {name: getattr(kept, name) for name in measured} == measured
    assert (kept.pid, bool(kept.birth), kept.outcome) == (os.getpid(), True, "done")
    (job,) = store.jobs()
    assert (job.name, job.outputs, job.state, job.run) == ("a", ("/ranks/a",), "done", run.id)
    assert store.job(job.id) == job
    assert store.counts_by_state() == {state: int(state == "done") for state in STATES}


def test_asked_for_twice_it_waits_once_and_is_one_job(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    first, made = store.enqueue(conversion(), SERVE, "nightly")
    again, more = store.enqueue(conversion(), SERVE, "often")
    assert (made, more, again) == (True, False, first)
    # A batch has its own queue: it waits for its own run.
    other, _ = store.enqueue(conversion(), "batch", "batch")
    assert (other.id != first.id, other.job) == (True, first.job)
    assert [run.id for run in store.queue(SERVE)] == [first.id]
    assert [run.id for run in store.runs(job=first.job)] == [other.id, first.id]


def test_what_is_refused_at_once_is_a_run_that_ended(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    run, _ = store.enqueue(conversion(), SERVE, "test", "refused", 2, "no such model")
    assert (run.state, run.exit_code, run.error, run.ended is None) == ("refused", 2, "no such model", False)
    assert store.recent_failures(5) == [run]
    assert store.queue(SERVE) == []


def test_recent_failures_come_newest_first_and_no_more_than_asked(tmp_path: Path) -> None:
    clock = Clock()
    store = fresh(tmp_path, clock)
    for number, state in enumerate(("refused", "failed", "done", "crashed", "cancelled", "interrupted")):
        clock.now += 1
        _, attempt = running(store, str(number))
        assert store.finish(attempt, state, outcome=state, exit_code=0)  # type: ignore[arg-type]
    assert [run.name for run in store.recent_failures(10)] == ["5", "3", "1", "0"]
    assert [run.name for run in store.recent_failures(2)] == ["5", "3"]
    assert [run.name for run in store.runs(states=("done", "cancelled"))] == ["4", "2"]
    assert len(store.runs(since=clock.now - 1)) == 2
    assert [job.name for job in store.jobs(state="crashed")] == ["3"]


def test_cancel_takes_what_waits_at_once_and_has_what_runs_stopped(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    waiting, _ = store.enqueue(conversion("w"), SERVE, "test")
    assert store.cancel(waiting.job).state == "cancelled"
    with pytest.raises(BadInput, match="it ended: cancelled"):
        store.cancel(waiting.job)
    run, attempt = running(store)
    assert store.cancel(run.job).state == "running"
    worker = store.attempts(run.id)[0].worker
    assert store.cancellations(worker) == {attempt}
    assert store.cancellations("another") == frozenset()
    # It failed by itself in the meantime: it must not be tried again.
    assert store.finish(attempt, "waiting", outcome="failed", exit_code=3, not_before=5.0)
    assert store.run(run.id).state == "cancelled"


def test_retry_queues_a_job_that_ended_for_the_daemon(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    run, attempt = running(store, queue="batch")
    with pytest.raises(BadInput, match="it is running"):
        store.retry(run.job)
    store.finish(attempt, "failed", outcome="failed", exit_code=3)
    again = store.retry(run.job)
    assert (again.job, again.state, again.queue, again.cause) == (run.job, "queued", SERVE, "retry")
    assert (again.resources, again.room) == (run.resources, run.room)
    with pytest.raises(BadInput, match="nothing of that number"):
        store.retry(99)


def test_forget_keeps_what_left_scratch_and_what_has_not_ended(tmp_path: Path) -> None:
    clock = Clock()
    store = fresh(tmp_path, clock)
    for name, scratch in (("clean", ()), ("dirty", ("/scratch/x.zarr",))):
        run, _ = store.enqueue(conversion(name).__class__(**{**vars(conversion(name)), "scratch": scratch}), SERVE, "test")
        attempt = store.claim(run.id, store.register("serve").id)
        assert not isinstance(attempt, frozenset)
        store.finish(attempt.id, "failed", outcome="failed", exit_code=3)
    running(store, "busy")
    clock.now += 100
    assert store.forget(clock.now - 50) == 1
    assert {job.name for job in store.jobs()} == {"dirty", "busy"}
    store.drop_scratch("/scratch/x.zarr")
    assert store.forget(clock.now - 50) == 1
    assert {job.name for job in store.jobs()} == {"busy"}


def test_a_store_is_the_same_when_it_is_opened_again(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    run, _ = running(store)
    store.set_fired("nightly", 12.5)
    store.set_arrival("w", "/models/a", "abc")
    store.close()
    again = fresh(tmp_path)
    assert again.run(run.id) == run
    assert (again.fired("nightly"), again.fired("other")) == (12.5, None)
    assert (again.arrival("w", "/models/a"), again.arrival("w", "/models/b")) == ("abc", None)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.write_text("not a database at all, but long enough to be looked at" * 20), "file is not a database"),
        (lambda path: sqlite3.connect(path).execute("create table mine (x)").connection.close(), "another program"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
    ids=["no database", "another's", "a directory"],
)
def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path, make: object, found: str) -> None:
    path = tmp_path / "jobs.db"
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(BadInput, match=found):
        open_store(path)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_the_schema_of_a_later_version_is_refused_clearly(tmp_path: Path) -> None:
    fresh(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "jobs.db")
    connection.execute(f"pragma user_version={tables.VERSION + 1}")
    connection.close()
    with pytest.raises(BadInput, match=rf"found schema {tables.VERSION + 1}; expected schema {tables.VERSION}. Use the version"):
        fresh(tmp_path)


def test_the_database_itself_refuses_a_second_attempt_under_way(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    run, _ = running(store)
    store.close()
    connection = sqlite3.connect(tmp_path / "jobs.db")
    more = (
        "insert into attempts (run, number, worker, birth, started, error, bytes_read, bytes_written, peak_memory_bytes, by_stage)"
    )
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        connection.execute(f"{more} select run, 2, worker, '', 0, '', 0, 0, 0, '{{}}' from attempts where run = {run.id}")


HALF_WAY = """
import sys, time
from pathlib import Path
from pipeline.jobs.store import open_store
from pipeline.jobs.tables import runs
from tests.pipeline.jobs.stores import conversion
store = open_store(Path(sys.argv[1]))
store.enqueue(conversion("whole"), "serve", "test")
with store.engine.begin() as connection:
    connection.execute(runs.update().values(state="done"))
    connection.execute(runs.insert().values(job=1, state="queued", cause="half", queue="serve", resources=[], queued=0.0))
    print("half-way", flush=True)
    time.sleep(60)
"""


def test_kill_in_the_middle_of_a_transaction_leaves_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    child = subprocess.Popen([sys.executable, "-c", HALF_WAY, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "half-way\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = open_store(path)
    assert [(run.name, run.state, run.cause) for run in store.runs()] == [("whole", "queued", "test")]
    assert store.cancel(1).state == "cancelled"
