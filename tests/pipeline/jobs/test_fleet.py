"""The fleet, its attempts played: what units get, what is tried again, and what stopping, cancelling and splitting leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.jobs.tasks
from pipeline.errors import BadInput
from pipeline.jobs.batch import cluster, summary
from pipeline.jobs.fleet import Fleet
from pipeline.jobs.retry import Retry
from pipeline.jobs.runs import Run
from pipeline.jobs.units import Unit
from tests.pipeline.jobs.stand_in import Stage as Played
from tests.pipeline.jobs.stand_in import unit as a_unit

GIB = 1 << 30
WAIT_SECONDS = 20.0
QUICK = Retry(attempts=3, first_seconds=0.05, factor=1)


@dataclass
class Stage:
    """What attempts do: the codes that those of a unit end with (0 when they are used up).

    `held`: units, or single attempts ("a 2"), that wait to be let go.
    """

    codes: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)
    passing: bool = False
    now: list[str] = field(default_factory=list)
    most: int = 0
    began: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)


STAGE = Stage()


def played(run: int, number: int, options: Mapping[str, Any], topic: str, _stop_seconds: float) -> dict[str, Any]:
    """Stands for `on_worker`."""
    from distributed import get_worker

    worker, name = get_worker(), str(options["name"])
    key = worker.get_current_task()
    STAGE.began.append(name)
    STAGE.now.append(name)
    STAGE.most = max(STAGE.most, len(STAGE.now))
    worker.log_event(topic, {"event": "began", "run": run, "pid": 1, "host": "here"})
    while any(not STAGE.held[each].wait(0.02) for each in (name, f"{name} {number}") if each in STAGE.held):
        task = worker.state.tasks.get(key)
        if task is None or task.state != "executing":
            STAGE.stopped.append(name)
            STAGE.now.remove(name)
            result = {"code": 3, "error": "stopped", "seconds": 1.0}
            worker.log_event(topic, {"event": "over", "run": run, "attempt": number, "result": result})
            return result
    time.sleep(0.05)
    STAGE.now.remove(name)
    codes = STAGE.codes.get(name, [])
    code = codes.pop(0) if codes else 0
    return {"code": code, "error": f"code {code}" if code else "", "passing": STAGE.passing, "seconds": 1.0, "bytes_written": 7}


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(pipeline.jobs.tasks, "on_worker", played)
    monkeypatch.setattr("tests.pipeline.jobs.test_fleet.STAGE", Stage())
    return STAGE


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with cluster(None, 8, 10 * GIB) as workers:
        yield workers.client


def unit(name: str, memory: int = GIB, **values: Any) -> Unit:
    return Unit(name, (name,), "/m", (f"/nowhere/{name}",), {"name": name}, peak_memory_bytes=memory, **values)


def until(fleet: Fleet, condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, [(run.unit.name, run.state, run.error) for run in fleet.runs.values()]
        fleet.step()
        time.sleep(0.02)


def done(fleet: Fleet, *units: Unit) -> list[Run]:
    runs = fleet.add(units, "test")
    until(fleet, lambda: not fleet.active())
    return runs


def test_units_take_no_more_memory_together_than_their_worker_offers(client: Any) -> None:
    runs = done(Fleet(client), *(unit(f"u{number}", 4 * GIB) for number in range(5)))
    assert [run.state for run in runs] == ["done"] * 5
    assert STAGE.most == 2
    assert STAGE.began == sorted(STAGE.began), "in their order"


def test_two_fleets_on_one_cluster_share_its_memory(client: Any) -> None:
    fleets = [Fleet(client), Fleet(client)]
    for number, fleet in enumerate(fleets):
        fleet.add([unit(f"{number}-{each}", 5 * GIB) for each in range(3)], "test")
    until(fleets[0], lambda: not fleets[1].step() and not fleets[0].active() and not fleets[1].active())
    assert (STAGE.most, len(STAGE.began)) == (2, 6)


def test_what_no_worker_can_take_fails_at_once_with_both_figures(client: Any) -> None:
    (run,) = done(Fleet(client), unit("huge", 11 * GIB))
    assert (run.state, run.exit_code, STAGE.began) == ("refused", 2, [])
    assert "at most 10.0 GiB of MEMORY" in run.error
    assert "one with 11.0 GiB" in run.error


def test_what_may_pass_is_tried_again_and_holds_nothing_meanwhile(client: Any) -> None:
    STAGE.codes = {"bad-disk": [3, -9], "lost": [3, 3, 3], "wrong": [2], "bug": [1]}
    fleet = Fleet(client, Retry(attempts=3, first_seconds=0.5, factor=1))
    fleet.add([unit(name, 10 * GIB) for name in STAGE.codes] + [unit("behind", 10 * GIB)], "test")
    until(fleet, lambda: "behind" in STAGE.began)
    assert STAGE.began.index("behind") <= 5, "those behind it begin while it waits"
    until(fleet, lambda: not fleet.active())
    found = {run.unit.name: (run.state, run.exit_code, len(run.attempts)) for run in fleet.runs.values()}
    assert found == {
        "bad-disk": ("done", 0, 3),
        "lost": ("failed", 3, 3),
        "wrong": ("refused", 2, 1),
        "bug": ("crashed", 1, 1),
        "behind": ("done", 0, 1),
    }


def test_what_is_refused_and_may_pass_is_tried_again(client: Any) -> None:
    STAGE.codes, STAGE.passing = {"taken": [2]}, True
    (run,) = done(Fleet(client, QUICK), unit("taken"))
    assert (run.state, len(run.attempts)) == ("done", 2)


@pytest.mark.parametrize(("passing", "code", "attempts"), [(True, 3, 3), (False, 2, 1)])
def test_what_is_refused_and_did_not_pass_may_pass_another_time(client: Any, passing: bool, code: int, attempts: int) -> None:
    STAGE.codes, STAGE.passing = {"taken": [2, 2, 2]}, passing
    fleet = Fleet(client, QUICK)
    (run,) = done(fleet, unit("taken"))
    assert (run.state, run.exit_code, len(run.attempts)) == ("refused", code, attempts)
    assert summary(fleet, [run], 1.0)["exit_code"] == code


def test_a_refused_conversion_of_several_jobs_is_taken_apart(client: Any) -> None:
    STAGE.codes = {"both": [2], "b": [2]}
    fleet = Fleet(client, QUICK)
    (run,) = done(fleet, unit("both", parts=(unit("a"), unit("b"))))
    assert run.state == "split"
    said = summary(fleet, [run], 1.0)
    assert [(job["name"], job["outcome"], job["exit_code"]) for job in said["jobs"]] == [("a", "done", 0), ("b", "refused", 2)]
    assert said["exit_code"] == 2


def test_a_unit_waits_for_the_one_that_it_comes_after(client: Any) -> None:
    STAGE.held["first"] = threading.Event()
    fleet = Fleet(client)
    fleet.add([unit("first"), unit("second", after="first"), unit("other")], "test")
    until(fleet, lambda: "other" in STAGE.began)
    assert "second" not in STAGE.began
    STAGE.codes["first"] = [2]
    STAGE.held["first"].set()
    until(fleet, lambda: not fleet.active())
    assert "second" in STAGE.began, "also where that has failed"


def test_cancelling_ends_what_runs_in_order_and_what_waits_at_once(client: Any) -> None:
    STAGE.held["at work"] = threading.Event()
    fleet = Fleet(client, QUICK)
    at_work, other, waiting = fleet.add([unit("at work", 9 * GIB), unit("other"), unit("waiting", 9 * GIB)], "test")
    until(fleet, lambda: at_work.state == "running" and other.state == "done")
    fleet.cancel(waiting.number)
    fleet.cancel(at_work.number)
    until(fleet, lambda: not fleet.active())
    assert (at_work.state, waiting.state, STAGE.stopped) == ("cancelled", "cancelled", ["at work"])
    assert "waiting" not in STAGE.began
    with pytest.raises(BadInput, match="none that waits or runs"):
        fleet.cancel(at_work.number)


def test_stopping_interrupts_all_that_is_not_done(client: Any) -> None:
    STAGE.held["at work"] = threading.Event()
    fleet, stop = Fleet(client, QUICK), threading.Event()
    runs = fleet.add([unit("at work", 9 * GIB), unit("done"), unit("waiting", 9 * GIB)], "test")
    until(fleet, lambda: runs[1].state == "done" and runs[0].state == "running")
    stop.set()
    fleet.work(stop, until_idle=True)
    assert [run.state for run in runs] == ["interrupted", "done", "interrupted"]
    assert STAGE.stopped == ["at work"]
    assert summary(fleet, runs, 1.0)["exit_code"] == 3


def test_the_disk_must_have_room_for_all_that_is_on_its_way(client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", lambda _: 100)
    STAGE.held["a"] = threading.Event()
    units = [replace(unit(name), room={str(tmp_path / name): size}) for name, size in (("a", 60), ("b", 60), ("c", 10), ("d", 101))]
    fleet = Fleet(client, Retry(attempts=2, first_seconds=0.05, factor=1))
    a, b, c, d = fleet.add(units, "test")
    until(fleet, lambda: a.state == "running")
    time.sleep(0.3)
    fleet.step()
    assert STAGE.began == ["a"], "those behind one that has no room do not pass it"
    STAGE.held["a"].set()
    until(fleet, lambda: not fleet.active())
    assert [run.state for run in (a, b, c, d)] == ["done", "done", "done", "refused"]
    assert "100 B free" in d.error


@pytest.mark.parametrize(
    ("error", "ended"),
    [(OSError(116, "Stale file handle"), ("failed", 3)), (ZeroDivisionError("division by zero"), ("crashed", 1))],
    ids=["a stale mount", "a bug"],
)
def test_a_place_that_cannot_be_looked_at_ends_its_own_run_alone(
    client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, ended: tuple[str, int]
) -> None:
    def free(place: Path) -> int:
        if place.name == "stale":
            raise error
        return GIB

    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", free)
    STAGE.held["at work"] = threading.Event()
    stale = replace(unit("stale"), room={str(tmp_path / "stale"): 1})
    fleet = Fleet(client, QUICK)
    at_work, one, behind = fleet.add([unit("at work"), stale, unit("behind", after="at work")], "test")
    until(fleet, lambda: one.ended)
    STAGE.held["at work"].set()
    until(fleet, lambda: not fleet.active())
    assert (one.state, one.exit_code) == ended
    assert str(error.args[-1]) in one.error
    assert [run.state for run in (at_work, behind)] == ["done", "done"]
    assert "stale" not in STAGE.began


def test_a_place_of_one_on_its_way_that_goes_stale_keeps_no_other_from_beginning(
    client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def free(place: Path) -> int:
        if place.name == "stale" and "stale" in STAGE.began:
            raise OSError(116, "Stale file handle")
        return GIB

    monkeypatch.setattr("pipeline.sinks.output_checks.free_bytes", free)
    STAGE.held["stale"] = threading.Event()
    fleet = Fleet(client, QUICK)
    stale, other = (replace(unit(name), room={str(tmp_path / name): 1}) for name in ("stale", "other"))
    (first,) = fleet.add([stale], "test")
    until(fleet, lambda: first.state == "running")
    monkeypatch.setattr("pipeline.sinks.output_checks._nearest", lambda path, _measure: hash(path))  # a file system each
    (second,) = fleet.add([other], "test")
    until(fleet, lambda: second.ended)
    STAGE.held["stale"].set()
    until(fleet, lambda: not fleet.active())
    assert [first.state, second.state] == ["done", "done"]


def test_a_scheduler_that_is_lost_for_good_ends_all_as_interrupted() -> None:
    stage = Played(Retry(first_seconds=0.0))
    ended, running, queued = stage.queue(*(a_unit(name) for name in ("a", "b", "c")))
    stage.start(ended)
    stage.end(ended)
    stage.start(running)
    stage.client.status = "closed"
    begun = time.monotonic()
    stage.fleet.work(threading.Event(), until_idle=True)
    assert time.monotonic() - begun < 5, "nobody is waited for"
    assert [(run.state, run.exit_code) for run in (ended, running, queued)] == [("done", 0), ("interrupted", 3), ("interrupted", 3)]
    assert "lost" in running.error
    assert summary(stage.fleet, [ended, running, queued], 1.0)["exit_code"] == 3


def test_one_that_writes_nothing_is_said_to_stall_once(client: Any) -> None:
    STAGE.held["slow"] = threading.Event()
    heard: list[str] = []
    fleet = Fleet(client, stall_seconds=0.2)
    fleet.listeners.append(lambda event, _run, _said: heard.append(event))
    fleet.add([unit("slow")], "test")
    until(fleet, lambda: "stalled" in heard)
    time.sleep(0.3)
    fleet.step()
    STAGE.held["slow"].set()
    until(fleet, lambda: not fleet.active())
    assert heard == ["queued", "started", "stalled", "ended"]


def test_a_listener_that_fails_harms_nothing(client: Any) -> None:
    fleet = Fleet(client)
    fleet.listeners.append(lambda event, _run, _said: 1 / 0 if event == "started" else None)
    assert done(fleet, unit("a"))[0].state == "done"


def test_the_word_of_an_earlier_attempt_ends_no_later_one(client: Any) -> None:
    STAGE.codes["a"], STAGE.held["a 2"] = [0, 4], threading.Event()
    fleet = Fleet(client)
    (run,) = fleet.add([replace(unit("a"), options={"name": "a", "engine": {}}, engines=("/nowhere/a-engine",))], "test")
    until(fleet, lambda: len(run.attempts) == 1 and len(STAGE.began) == 2)
    fleet._inbox.put({"event": "over", "run": run.number, "attempt": 1, "result": {"code": 0}})
    time.sleep(0.1)
    fleet.step()
    assert run.state == "running", "the engine is being built"
    STAGE.held["a 2"].set()
    until(fleet, lambda: not fleet.active())
    assert (run.state, len(run.attempts)) == ("no engine", 2)


def test_engines_are_built_of_whole_ranks_where_there_is_a_gpu(client: Any) -> None:
    fleet = Fleet(client)
    built = replace(unit("a"), options={"name": "a", "engine": {"max_batch_size": 8}}, engines=("/nowhere/a-engine",))
    (run,) = done(fleet, built)
    assert (run.state, STAGE.began) == ("done", ["a", "a"])
    STAGE.codes["b"] = [0, 4]
    (run,) = done(fleet, replace(built, name="b", options={"name": "b", "engine": {}}))
    assert (run.state, run.exit_code) == ("no engine", 4)


def test_layers_that_are_calibrated_are_progress(client: Any) -> None:
    STAGE.held["a"] = threading.Event()
    fleet = Fleet(client)
    (run,) = fleet.add([unit("a")], "test")
    until(fleet, lambda: run.state == "running")
    moved = []
    for layers in (1, 1, 2):
        fleet._inbox.put({"event": "progress", "run": run.number, "bytes": 0, "calibrated_layers": layers})
        time.sleep(0.05)
        fleet.step()
        moved.append(run.moved)
    STAGE.held["a"].set()
    until(fleet, lambda: not fleet.active())
    assert moved[0] == moved[1] < moved[2]
