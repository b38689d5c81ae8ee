"""The daemon: triggers become conversions, people can step in, and it stops and starts without losing or doubling any."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import convert
from pipeline.jobs.events import Event, JobFinished, JobQueued
from pipeline.jobs.rows import ACTIVE, RunRow
from pipeline.jobs.schedule import read_schedule
from pipeline.jobs.serve import Daemon
from pipeline.jobs.store import JobStore, open_store
from tests.support import checkpoints
from tests.support.commands import COMMAND, headrace
from tests.support.directories import contents

WAIT_SECONDS = 60.0


def wait(until: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = open_store(tmp_path / "jobs.db")
    yield opened
    opened.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def often(tmp_path: Path, every: float = 3600) -> Path:
    """A schedule of one interval, and the job that it does."""
    write(tmp_path / "job.toml", 'model_dir = "model"\noutput_dir = "out"\ntp_size = 2\n')
    text = f'[[interval]]\nname = "often"\nevery_seconds = {every}\nfiles = ["job.toml"]\n[retry]\nfirst_seconds = 0.2\n'
    return write(tmp_path / "schedule.toml", text)


@contextlib.contextmanager
def serving(schedule: Path, store: JobStore, *listeners: Callable[[Event], None]) -> Iterator[Daemon]:
    """A daemon in a thread of its own."""
    daemon = Daemon(read_schedule(schedule), store)
    for listener in listeners:
        daemon.hub.subscribe(listener)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.stop.set()
        daemon.runner.wake.set()
        thread.join()


@contextlib.contextmanager
def process(schedule: Path, store: JobStore) -> Iterator[subprocess.Popen[str]]:
    """A daemon in a process of its own."""
    command = [*COMMAND, "serve", str(schedule), "--store", str(store.path), "--log_format", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def state(store: JobStore, name: str) -> str:
    return next((job.state for job in store.jobs() if job.name == name), "")


def only(store: JobStore) -> RunRow:
    (run,) = store.runs()
    return run


def test_a_trigger_fires_and_sigterm_ends_in_order(tmp_path: Path, store: JobStore, model: Path) -> None:
    schedule = often(tmp_path)
    with process(schedule, store) as started:
        wait(lambda: state(store, "job") == "done")
        second = headrace("serve", schedule, "--store", store.path)
        assert (second.code, f"process {started.pid}, a daemon on this store" in second.err) == (2, True)
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate()
        assert started.returncode == 0
    said = [json.loads(line)["event"] for line in errors.splitlines()]
    assert said == ["page", "serving", "queued", "started", "progress", "finished", "stopped"]
    convert(model_dir=model, output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert [worker.ended is None for worker in store.workers()] == [False, False]
    # The next one knows that it has fired.
    with serving(schedule, store):
        time.sleep(1)
    assert only(store).cause == "often"


def test_what_was_missed_is_made_up_for_and_what_is_done_is_not_recorded_again(
    tmp_path: Path, store: JobStore, model: Path
) -> None:
    schedule, heard = often(tmp_path), list[Event]()
    convert(model_dir=model, output_dir=tmp_path / "out", tp_size=2, scheduler="threads")
    for _ in range(2):
        store.set_fired("often", time.time() - 7201)  # two moments missed
        with serving(schedule, store, heard.append):
            wait(lambda: (store.fired("often") or 0) > time.time() - 60)
    assert only(store).state == "up_to_date"
    assert [type(event) for event in heard] == [JobFinished]


def test_sigterm_in_the_middle_leaves_a_conversion_that_the_next_daemon_ends(tmp_path: Path, store: JobStore, model: Path) -> None:
    schedule = often(tmp_path)
    with process(schedule, store) as started:
        wait(lambda: store.runs(states=("running",)))
        started.send_signal(signal.SIGTERM)
        started.communicate()
        assert started.returncode == 0
    run = only(store)
    assert (run.state, [each.outcome for each in store.attempts(run.id)]) in (("queued", ["interrupted"]), ("done", ["done"]))
    with serving(schedule, store):
        wait(lambda: only(store).state == "done")
    assert (tmp_path / "out/config.json").exists()
    assert model.exists()


def test_people_can_cancel_and_retry_while_it_runs(tmp_path: Path, store: JobStore, model: Path) -> None:
    schedule, heard = often(tmp_path), list[Event]()
    with serving(schedule, store, heard.append):
        wait(lambda: store.runs(states=("running",)))
        number = only(store).job
        assert headrace("jobs", "cancel", number, "--store", store.path).code == 0
        wait(lambda: only(store).state not in ACTIVE)
        assert only(store).state in ("cancelled", "done")
        assert headrace("jobs", "retry", number, "--store", store.path).code == 0
        wait(lambda: store.job(number).state in ("done", "up_to_date"))
    assert [event.cause for event in heard if isinstance(event, JobQueued)] == ["often", "retry"]
    assert model.exists()


def test_a_batch_file_that_is_wrong_shows_as_a_refused_run(tmp_path: Path, store: JobStore) -> None:
    write(tmp_path / "batch.toml", "[[matrix]]\nmodel_dir = 3\n")
    text = '[[interval]]\nname = "bad"\nevery_seconds = 1\nfiles = ["batch.toml"]\n'
    heard: list[Event] = []
    with serving(write(tmp_path / "schedule.toml", text), store, heard.append):
        wait(lambda: state(store, "bad") == "refused")
        time.sleep(2.5)  # it fires again, and finds the same
    assert "batch.toml: matrix.0.output_dir" in only(store).error
    assert [event.outcome for event in heard if isinstance(event, JobFinished)] == ["refused"]
    # It never became a job that could be done.
    assert "never became one" in headrace("jobs", "retry", only(store).job, "--store", store.path).err


@pytest.mark.parametrize("remote", [False, True], ids=["directory", "URL"])
def test_what_arrives_is_converted_once(tmp_path: Path, store: JobStore, remote: bool) -> None:
    (tmp_path / "in").mkdir()
    place = f'path = "file://{tmp_path}/in"\nfetch_to = "fetched"' if remote else 'path = "in"'
    text = f"""
    [[watch]]
    name = "arrivals"
    {place}
    every_seconds = 0.2
    settle_seconds = 0.5
    [watch.job]
    tp_size = [1, 2]
    output_dir = "out/{{model}}-{{tp_size}}"
    """
    schedule = write(tmp_path / "schedule.toml", text)
    with serving(schedule, store):
        checkpoints.write(tmp_path / "in/[new] model", checkpoints.LLAMA, shards=2)
        wait(lambda: (tmp_path / "out/[new] model-2/config.json").exists() and not store.runs(states=ACTIVE))
        time.sleep(1)
    assert (only(store).cause, only(store).state) == ("arrivals", "done")
    assert (tmp_path / "out/[new] model-1/config.json").exists()
    assert bool(list(tmp_path.glob("fetched/*/* model/config.json"))) == remote
    with serving(schedule, store):
        time.sleep(1.5)
    assert len(store.runs()) == 1, "also the next daemon knows it"


def test_services_are_there_for_as_long_as_there_is_work(tmp_path: Path, store: JobStore, model: Path) -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def service(daemon: Daemon) -> Iterator[None]:
        order.append("entered")
        daemon.hub.subscribe(lambda event: order.append(type(event).__name__))
        yield
        order.append(f"left with {daemon.runner.running} running")

    daemon = Daemon(read_schedule(often(tmp_path)), store)
    daemon.services.append(service)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    wait(lambda: "JobStarted" in order)
    daemon.stop.set()
    thread.join()
    assert order[:3] == ["entered", "JobQueued", "JobStarted"]
    assert order[-1] == "left with 0 running"
    assert "JobFinished" in order
    assert model.exists()


def test_no_schedule_and_no_store_are_refused(tmp_path: Path) -> None:
    for schedule, path in (("gone.toml", "jobs.db"), ("schedule.toml", ".")):
        write(tmp_path / "schedule.toml", "")
        ran = headrace("serve", tmp_path / schedule, "--store", tmp_path / path)
        assert ran.code == 2
        assert "Traceback" not in ran.err


def test_the_daemon_imports_nothing_of_what_plans_and_converts() -> None:
    code = "import sys; import pipeline.jobs.serve; print(*sorted({'dask', 'torch', 'zarr', 'distributed'} & set(sys.modules)))"
    ran = subprocess.run([*COMMAND[:2], "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert ran.stdout.strip() == ""
