"""What is kept and for how long: scratch that runs leave, and records; never an output, never what may still be used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import fsspec
import pytest

from pipeline import Interrupted, convert
from pipeline.jobs.retention import DAY, Retention, collect, release, remove_cut
from pipeline.jobs.rows import AttemptRow, State
from pipeline.jobs.store import SERVE, JobStore
from pipeline.sinks.journal import Journal
from tests.pipeline.jobs.stores import Clock, conversion, fresh
from tests.pipeline.run.test_interruption import Meddler
from tests.support import checkpoints
from tests.support.commands import headrace

KEEP = Retention(failed_scratch_days=7, record_days=30)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    return fresh(tmp_path, clock)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """What a conversion that was stopped leaves in scratch."""

    def stop() -> None:
        raise KeyboardInterrupt

    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    options = {"model_dir": tmp_path / "model", "output_dir": tmp_path / "out", "scheduler": "threads", "scratch_after": "unpack"}
    with pytest.raises(Interrupted):
        convert(**options, listener=Meddler(stop, on="advanced"))
    (found,) = (tmp_path / ".headrace-scratch").iterdir()
    return found


def ended(store: JobStore, name: str, state: State, *places: object, resources: bool = False) -> int:
    """A run that ended so, with its scratch."""
    made = dataclasses.replace(conversion(name), scratch=tuple(map(str, places)))
    if resources:
        made = dataclasses.replace(made, resources=(*made.resources, *made.scratch))
    run, _ = store.enqueue(made, SERVE, "test")
    attempt = store.claim(run.id, store.register("serve").id)
    assert isinstance(attempt, AttemptRow)
    if state != "running":
        assert store.finish(attempt.id, state, outcome="failed" if state == "waiting" else state, exit_code=0)
    return run.id


def test_scratch_of_failed_runs_is_kept_so_long_and_then_removed(store: JobStore, clock: Clock, cut: Path) -> None:
    ended(store, "a", "failed", cut)
    clock.now += 7 * DAY - 1
    assert collect(store, KEEP).scratch == ()
    clock.now += 2
    assert collect(store, KEEP, dry_run=True).scratch == (str(cut),)
    assert cut.exists()
    assert collect(store, KEEP).scratch == (str(cut),)
    assert not cut.parent.exists(), "the default directory goes with its last cut"
    assert (cut.parent.parent / "out").exists(), "outputs, whole or not, stay"
    assert collect(store, KEEP).scratch == ()


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_what_another_run_may_use_stays(store: JobStore, clock: Clock, cut: Path, state: State) -> None:
    ended(store, "a", "failed", cut)
    clock.now += 8 * DAY
    ended(store, "b", state, cut)
    assert collect(store, KEEP).scratch == ()
    assert cut.exists()


def test_what_a_job_by_hand_is_at_work_on_stays(store: JobStore, clock: Clock, cut: Path) -> None:
    ended(store, "a", "failed", cut)
    clock.now += 8 * DAY
    held = Journal(cut / "headrace.journal")
    assert not remove_cut(str(cut))
    assert collect(store, KEEP).scratch == ()
    held.close()
    assert collect(store, KEEP).scratch == (str(cut),)


def test_what_is_no_cut_is_never_removed(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    mine = tmp_path / "mine.zarr"
    mine.mkdir()
    (mine / "zarr.json").write_text(json.dumps({"attributes": {"made by": "somebody else"}}))
    ended(store, "a", "failed", mine)
    clock.now += 8 * DAY
    collect(store, KEEP)
    assert (mine / "zarr.json").exists()


def test_shared_scratch_goes_with_the_last_that_ends_well(store: JobStore, cut: Path) -> None:
    first = ended(store, "a", "done", cut, resources=True)
    second, _ = store.enqueue(dataclasses.replace(conversion("b"), scratch=(str(cut),)), SERVE, "test")
    release(store, store.run(first))
    assert cut.exists()
    store.cancel(second.job)
    release(store, store.run(first))
    assert cut.exists(), "what did not end well may be tried again"
    again = ended(store, "b", "done", cut, resources=True)
    release(store, store.run(again))
    assert not cut.exists()
    assert store.run(first).scratch == ()


def test_remote_scratch_is_removed_too(store: JobStore, clock: Clock) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/cuts/x.zarr/zarr.json", b"{}")
    ended(store, "a", "cancelled", "memory://cuts/x.zarr")
    clock.now += 8 * DAY
    assert collect(store, KEEP).scratch == ("memory://cuts/x.zarr",)
    assert not files.exists("/cuts/x.zarr")


def test_records_are_forgotten_but_not_before_their_scratch(store: JobStore, clock: Clock, cut: Path) -> None:
    ended(store, "a", "failed", cut)
    ended(store, "b", "done")
    clock.now += 31 * DAY
    held = Journal(cut / "headrace.journal")
    assert collect(store, KEEP).runs == 1
    held.close()
    assert collect(store, KEEP, dry_run=True).runs == 1
    assert collect(store, KEEP).runs == 1
    assert store.jobs() == []


def test_the_command(tmp_path: Path, cut: Path) -> None:
    store = JobStore(tmp_path / "jobs.db", Clock(0.0))
    ended(store, "a", "failed", cut)
    store.close()
    arguments = ("gc", "--store", tmp_path / "jobs.db")
    assert json.loads(headrace(*arguments, "--failed_scratch_days", 99999, "--record_days", 99999, "--json").out)["scratch"] == []
    assert str(cut) in headrace(*arguments, "--dry_run").out.replace("\n", "")
    assert cut.exists()
    assert json.loads(headrace(*arguments, "--json").out) == {"scratch": [str(cut)], "runs": 1, "dry_run": False}
