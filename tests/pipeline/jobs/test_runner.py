"""The runner, with a fake clock and fakes for processes: what it begins, when it tries again, what it tells."""

from __future__ import annotations

import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.jobs.events import JobFinished, JobQueued, JobStarted, Outcome, Progress, Stalled
from pipeline.jobs.leases import HEARTBEAT_SECONDS, LEASE_SECONDS
from pipeline.jobs.limits import Limits
from pipeline.jobs.retry import Retry
from pipeline.jobs.rows import AttemptRow
from pipeline.jobs.store import SERVE, JobStore
from tests.pipeline.jobs.fakes import GIB, Stage
from tests.pipeline.jobs.stores import Clock, conversion, fresh

RETRY = Retry(attempts=3, first_seconds=10, factor=4, longest_seconds=30)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    return fresh(tmp_path, clock)


@pytest.fixture
def stage(store: JobStore) -> Stage:
    return Stage(store, retry=RETRY)


def queued(store: JobStore, name: str = "a", *resources: str, queue: str = SERVE) -> int:
    return store.enqueue(conversion(name, *resources), queue, "test")[0].id


def test_a_conversion_is_started_heard_and_recorded(store: JobStore, stage: Stage) -> None:
    run = queued(store)
    stage.step()
    (fake,) = stage.made
    assert fake.told == ["go"]
    assert tomllib.loads(fake.text) == store.job(store.run(run).job).options
    progress = {"event": "progress", "bytes": 5, "total_bytes": 9, "bytes_per_second": 2, "eta_seconds": 2.0, "layer": "layers.1"}
    fake.heard({**progress, "stages": {"read": {"seconds": 0.5}}})
    fake.finished = {"bytes_written": 9, "bytes_read": 8, "peak_memory_bytes": 7, "up_to_date": False}
    fake.code, fake.done_bytes, fake.total_bytes, fake.stages = 0, 9, 9, {"write": {"seconds": 1.5}}
    stage.step()
    assert [type(event) for event in stage.events] == [JobQueued, JobStarted, Progress, JobFinished]
    assert {(event.job, event.run, event.name) for event in stage.events} == {(store.run(run).job, run, "a")}
    ended = stage.heard(JobFinished)[0]
    assert (ended.outcome, ended.exit_code, ended.bytes, ended.bytes_read, ended.peak_memory_bytes) == ("done", 0, 9, 8, 7)
    assert (ended.by_stage, ended.error, ended.retry_seconds) == ({"write": {"seconds": 1.5}}, "", None)
    row = store.run(run)
    assert (row.state, row.bytes_done, row.exit_code) == ("done", 9, 0)
    assert not list(store.path.with_name("jobs.db.d").iterdir())


@given(st.integers(1, 8), st.floats(0, 1e6), st.floats(1, 1e9), st.floats(0, 1e9), st.integers(1, 10), st.booleans())
def test_what_is_tried_again_and_when(
    attempts: int, first: float, factor: float, longest: float, failures: int, passing: bool
) -> None:
    retry = Retry(attempts=attempts, first_seconds=first, factor=factor, longest_seconds=longest)
    for outcome in ("done", "up_to_date", "crashed", "cancelled", "interrupted", "split"):
        assert retry.delay(outcome, failures, passing) is None
    assert (retry.delay("refused", failures, False)) is None, "bad input is never tried again"
    wait = retry.delay("failed", failures, passing)
    assert (wait is None) == (failures >= attempts)
    if wait is not None:
        assert 0 <= wait <= longest
        assert wait == retry.delay("refused", failures, True)
        before = retry.delay("failed", failures - 1, passing) if failures > 1 else None
        assert before is None or wait in (before, longest) or wait == pytest.approx(before * factor)


def test_failures_are_tried_again_after_longer_and_longer_waits(store: JobStore, stage: Stage, clock: Clock) -> None:
    run = queued(store)
    waits = []
    for attempt in range(1, 4):
        stage.step()
        assert len(stage.made) == attempt
        stage.made[-1].code, stage.made[-1].error = 3, "the disk went away"
        stage.step()
        if attempt == 3:
            break
        waits.append(store.run(run).not_before - clock.now)
        clock.now += waits[-1] - 0.1
        stage.step()
        assert (len(stage.made), store.run(run).state) == (attempt, "waiting"), "not a moment too soon"
        clock.now += 0.1
    assert waits == [10, 30]
    row = store.run(run)
    assert (row.state, row.exit_code, row.failures, row.error) == ("failed", 3, 3, "the disk went away")
    assert [each.outcome for each in store.attempts(run)] == ["failed"] * 3
    assert [event.retry_seconds for event in stage.heard(JobFinished)] == [10, 30, None]


@pytest.mark.parametrize(
    ("code", "passing", "outcome", "again"),
    [
        (1, False, "crashed", False),
        (2, False, "refused", False),
        (2, True, "refused", True),
        (3, False, "failed", True),
        (-9, False, "failed", True),
        (5, False, "crashed", False),
    ],
)
def test_what_each_exit_code_is(store: JobStore, stage: Stage, code: int, passing: bool, outcome: Outcome, again: bool) -> None:
    run = queued(store)
    stage.step()
    stage.made[0].code, stage.made[0].passing = code, passing
    stage.step()
    ended = stage.heard(JobFinished)[0]
    assert (ended.outcome, ended.retry_seconds is not None) == (outcome, again)
    assert store.run(run).state == ("waiting" if again else outcome)
    assert ended.exit_code == (3 if code < 0 else code)
    assert ("SIGKILL" in ended.error) == (code == -9)


def test_nothing_to_do_is_told_apart(store: JobStore, stage: Stage) -> None:
    run = queued(store)
    stage.step()
    stage.made[0].code, stage.made[0].finished = 0, {"up_to_date": True}
    stage.step()
    assert store.run(run).state == "up_to_date"


def test_a_refused_conversion_of_several_jobs_is_taken_apart(store: JobStore, stage: Stage) -> None:
    merged = replace(conversion("m (2 jobs)", "/ranks/x", "/ranks/y"), parts=(("x", 1), ("y", 1)))
    run, _ = store.enqueue(merged, SERVE, "night")
    stage.step()
    stage.made[0].code = 2
    stage.step()
    assert store.run(run.id).state == "split"
    assert stage.heard(JobFinished)[0].outcome == "split"
    parts = store.runs(states=("running",))
    assert {(each.name, each.outputs, each.resources, each.cause) for each in parts} == {
        ("x", ("/ranks/x",), ("/ranks/x",), "night"),
        ("y", ("/ranks/y",), ("/ranks/y",), "night"),
    }
    texts = [tomllib.loads(fake.text) for fake in stage.made[1:]]
    assert texts == [{"model_dir": "/models/m", "output_dir": output} for output in ("/ranks/x", "/ranks/y")]
    # One of them is refused by itself, and is not taken apart any further.
    stage.made[1].code, stage.made[2].code = 2, 0
    stage.step()
    assert sorted(store.run(each.id).state for each in parts) == ["done", "refused"]


def test_jobs_and_memory_bound_how_many_run(store: JobStore) -> None:
    stage = Stage(store, Limits(2, 100 * GIB))
    runs = [queued(store, name) for name in "abc"]
    stage.step(3)
    assert [store.run(run).state for run in runs] == ["running", "running", "queued"]
    stage.made[0].code = 0
    stage.step(2)
    assert [store.run(run).state for run in runs] == ["done", "running", "running"]


@pytest.mark.parametrize(("memory", "running"), [(250, 2), (199, 1), (50, 1)])
def test_projected_memory_bounds_how_many_run_but_one_always_does(store: JobStore, memory: int, running: int) -> None:
    stage = Stage(store, Limits(100, memory))
    for name in "abc":
        queued(store, name)  # of 100 bytes each
    stage.step(3)
    assert stage.runner.running == running


def test_disks_bound_how_many_run(store: JobStore, stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", lambda _: 15)
    for name in "ab":
        queued(store, name, str(tmp_path / name))  # of 10 bytes each
    stage.step(2)
    assert stage.runner.running == 1
    stage.made[0].code = 0
    stage.step(2)
    assert stage.runner.running == 1
    assert len(stage.made) == 2


def test_what_others_write_is_waited_for(store: JobStore, stage: Stage) -> None:
    other = Stage(store, queue="batch")
    first, second = queued(store, "one", "/ranks/a", queue="batch"), queued(store, "two", "/ranks/a")
    other.step()
    stage.step(3)
    assert (store.run(first).state, store.run(second).state) == ("running", "queued")
    other.made[0].code = 0
    other.step()
    stage.step()
    assert store.run(second).state == "running"


def test_cancelled_while_it_runs(store: JobStore, stage: Stage) -> None:
    run = queued(store)
    stage.step()
    store.cancel(store.run(run).job)
    stage.step(2)
    assert stage.made[0].told == ["go", "stop"]
    assert (store.run(run).state, stage.heard(JobFinished)[0].outcome) == ("cancelled", "cancelled")


@pytest.mark.parametrize(("queue", "state"), [(SERVE, "queued"), ("batch", "interrupted")])
def test_stopped_in_order_it_can_be_taken_up_again(store: JobStore, queue: str, state: str) -> None:
    stage = Stage(store, queue=queue)
    run = queued(store, queue=queue)
    stage.step()
    stage.runner.halt()
    assert stage.made[0].told == ["go", "stop"]
    assert (store.run(run).state, store.attempts(run)[0].outcome) == (state, "interrupted")


def test_one_that_does_not_stop_is_killed(store: JobStore, stage: Stage) -> None:
    run = queued(store)
    stage.step()
    stage.made[0].on_stop = None
    stage.runner.halt()
    assert stage.made[0].told == ["go", "stop", "kill"]
    assert store.run(run).state == "queued"


def test_a_stall_is_told_once_until_it_moves(store: JobStore, stage: Stage) -> None:
    queued(store)
    stage.step()
    fake = stage.made[0]
    stage.step()
    assert not stage.heard(Stalled)
    for _ in range(2):
        fake.moved = time.monotonic() - 51 - len(stage.heard(Stalled))
        stage.step(3)
    assert len(stage.heard(Stalled)) == 2
    assert stage.heard(Stalled)[0].seconds >= 51


def test_what_was_lost_is_stopped_and_its_end_not_recorded(store: JobStore, stage: Stage, clock: Clock) -> None:
    run = queued(store)
    stage.step()
    clock.now += LEASE_SECONDS + 1
    (attempt,) = store.attempts(run)
    assert store.lose(attempt)
    taken = store.claim(run, store.register("serve").id)
    assert isinstance(taken, AttemptRow)
    stage.runner._beat -= HEARTBEAT_SECONDS
    stage.step()
    assert stage.made[0].told == ["go", "kill"]
    assert [each.outcome for each in store.attempts(run)] == ["lost", None]
    assert store.run(run).state == "running"


def test_a_process_is_not_let_go_where_its_attempt_was_lost_before(store: JobStore, clock: Clock) -> None:
    stage = Stage(store)
    run = queued(store)
    start = stage.runner.start

    def slow(*arguments: object) -> object:
        clock.now += LEASE_SECONDS + 1
        assert store.lose(store.attempts(run)[0])
        return start(*arguments)  # type: ignore[arg-type]

    stage.runner.start = slow  # type: ignore[assignment]
    stage.step()
    assert stage.made[0].told == ["kill"]
    assert stage.runner.running == 0


def test_a_process_that_cannot_be_started_is_tried_again(store: JobStore, stage: Stage) -> None:
    run = queued(store)

    def fail(*_: object) -> object:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    stage.runner.start = fail  # type: ignore[assignment]
    stage.step()
    assert (store.run(run).state, store.run(run).failures) == ("waiting", 1)


def test_work_ends_when_nothing_waits_or_when_it_is_told_to(store: JobStore) -> None:
    stage = Stage(store)
    stage.runner.work(threading.Event(), until_idle=True)
    run, stop = queued(store), threading.Event()
    stop.set()
    stage.runner.work(stop, until_idle=True)
    assert store.run(run).state == "queued"


def test_a_listener_that_fails_harms_nobody(store: JobStore, stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("mine")

    end = stage.hub.subscribe(fail)
    run = queued(store)
    stage.step()
    assert store.run(run).state == "running"
    assert "a listener failed" in caplog.text
    end()
    caplog.clear()
    stage.made[0].code = 0
    stage.step()
    assert not caplog.records


def test_a_second_word_ends_it_at_once(store: JobStore) -> None:
    stage = Stage(store)
    stage.runner.stop_seconds = 3600.0
    queued(store)
    stage.step()
    stage.made[0].on_stop = None
    threading.Timer(0.2, lambda: setattr(stage.runner, "stop_seconds", 0.0)).start()
    stage.runner.halt()
    assert stage.made[0].told == ["go", "stop", "kill"]
