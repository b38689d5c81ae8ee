"""A batch: units on a cluster of this process or of several machines, and a summary of what came of each."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.jobs.fleet import Fleet
from pipeline.jobs.overview import Overview
from pipeline.jobs.runs import GOOD, Run
from pipeline.planning.listen import PAGE, Listen
from pipeline.sinks.output_checks import check_space
from pipeline.watching.metrics import Metrics
from pipeline.watching.server import serving

SCHEMA = 1
METRICS_SECONDS = 15.0  # between two writes of a file of metrics
THREADS = 8  # that one conversion keeps busy, at most
# Exit codes, the worst last: what running it again may mend, what lacks its engine, what somebody must mend, a bug.
_WORSE = (0, 3, 4, 2, 1)


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's where that is less."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, int(limit)) if limit.isdigit() else total


@dataclass(frozen=True)
class Workers:
    """A cluster that units run on: its client, and the address of its dashboard. `here`: it is in this process."""

    client: Any
    dashboard: str
    here: bool


@contextmanager
def cluster(
    scheduler: str | None,
    max_jobs: int | None,
    max_memory: int | None,
    listen: Listen | None = None,
    named: Mapping[str, Any] | None = None,
) -> Iterator[Workers]:
    """The cluster that units run on.

    Parameters
    ----------
    scheduler
        The address of one, `tcp://` or `tls://`, whose workers offer MEMORY; None for one in this process.
    max_jobs, max_memory
        Of that in this process: how many units at a time (None: one for eight cores), and the bytes of memory that all of them may
        use (None: four fifths of the machine's).
    listen
        Where the dashboard of that in this process is.
    named
        A `[cluster]` table: the class of a cluster that is started for it, or the TLS files of one at an address.
    """
    from pipeline.run.cluster import in_process_cluster
    from pipeline.run.schedulers import dashboard_link, elsewhere
    from stages.build.builders import gpus

    if scheduler is None and not named:
        resources = {"MEMORY": float(max_memory or machine_memory() * 4 // 5), "GPU": float(max(gpus(), 1))}
        at_once = max_jobs or max((os.cpu_count() or 1) // THREADS, 1)
        with in_process_cluster(at_once, resources, listen=listen) as client:
            # Dask names the machine's address even where the dashboard listens on this machine alone.
            port = client.scheduler_info()["services"]["dashboard"]
            yield Workers(client, Listen((listen or Listen()).host, port).url + "/status", True)
        return
    if scheduler and not scheduler.startswith(("tcp://", "tls://")):
        raise BadInput([Problem("--scheduler", scheduler, "tcp://HOST:PORT or tls://HOST:PORT of a Dask cluster")])
    with elsewhere(scheduler or "", named) as client:
        yield Workers(client, dashboard_link(client), False)


@contextmanager
def shown(fleet: Fleet, workers: Workers, listen: Listen | None) -> Iterator[tuple[Overview, str]]:
    """An overview of a fleet on a page while the context lasts, and the page's address.

    It is beside the dashboard of a cluster in this process; else on a server at `listen`.
    """
    overview = Overview(fleet, "batch", dashboard=workers.dashboard)
    if workers.here:
        workers.client.cluster.scheduler.http_application.add_handlers(".*", overview.routes())
        yield overview, workers.dashboard.removesuffix("/status") + PAGE
        return
    with serving(listen or Listen(), overview.routes(), or_any_port=listen is None) as url:
        yield overview, url + PAGE


@contextmanager
def metrics_kept(file: Path, overview: Overview) -> Iterator[None]:
    """Keep a file of metrics up to date: each time whole, by a rename. Raises BadInput where it cannot be written at first."""
    text, ended = Metrics(overview.reading).text, threading.Event()

    def write() -> None:
        new = file.with_name(f".{file.name}.new")
        new.write_bytes(text())
        new.replace(file)

    def work() -> None:
        while not ended.wait(METRICS_SECONDS):
            with suppress(OSError):  # the next may go well
                write()

    try:
        write()
    except OSError as error:
        raise BadInput([Problem(f"--metrics {file}", error.strerror or "an error", "a file that can be written")]) from None
    thread = threading.Thread(target=work, name="headrace-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            write()


def summary(fleet: Fleet, asked: Sequence[Run], seconds: float) -> dict[str, Any]:
    """The outcome of the runs that were asked for, as plain values: of each job, and of each unit that was made for them."""
    jobs = [_job(name, outputs, run) for run in asked for name, outputs, run in _members(fleet, run)]
    code = max((job["exit_code"] for job in jobs), key=_WORSE.index, default=0)
    counts = dict(Counter(job["outcome"] for job in jobs))
    units = [run.as_json() for run in fleet.runs.values()]
    return {"schema": SCHEMA, "exit_code": code, "seconds": round(seconds, 3), "counts": counts, "jobs": jobs, "units": units}


def planned(units: Sequence[Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The plan of a batch of these units, as plain values: the schema is that of `headrace batch --dry_run --json`.

    `files`: the job files that were written, by the units' names.
    """
    # Of all that is to be done, as each conversion takes the room that it needs and keeps it.
    needs = {Path(place): nbytes for unit in units if unit.state == "to do" for place, nbytes in unit.room.items()}
    obstacles = [str(problem) for problem in check_space(needs)]
    codes = [2 for unit in units if unit.state == "refused"] + [2 for _ in obstacles]
    rows = [{**unit.as_json(), "bytes": sum(unit.room.values()), "file": files.get(unit.name)} for unit in units]
    return {"schema": SCHEMA, "exit_code": max(codes, default=0), "obstacles": obstacles, "units": rows}


def _members(fleet: Fleet, run: Run) -> Iterator[tuple[str, tuple[str, ...], Run]]:
    """Each job of a run, its outputs, and the run that it ended in."""
    if run.parts:
        for number in run.parts:
            yield from _members(fleet, fleet.runs[number])
    elif run.unit.parts:
        for part in run.unit.parts:
            yield part.name, part.outputs, run
    else:
        yield run.unit.name, run.unit.outputs, run


def _job(name: str, outputs: tuple[str, ...], run: Run) -> dict[str, Any]:
    done = next((part.state for part in run.unit.parts if part.outputs == outputs), "")
    outcome = "up_to_date" if done == "up_to_date" and run.state == "done" else run.state
    code = 0 if run.state in GOOD else run.exit_code or 3
    return {"name": name, "unit": run.number, "outputs": list(outputs), "outcome": outcome, "exit_code": code, "error": run.error}
