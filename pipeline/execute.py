"""Run a plan on Dask: threads, synchronous, an in-process cluster with its dashboard, or a cluster elsewhere.

The only module that computes. Progress reaches a `Listener` as tasks end.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import BadInput, Interrupted, Problem, WriteFailed
from pipeline.lower import Graph, lower
from pipeline.plans import Plan

if TYPE_CHECKING:
    from stages.write import Written

BATCH = 64  # tasks submitted at once
IN_FLIGHT = 3  # batches that the scheduler knows of


class Listener(Protocol):
    """What hears of a run: each method is called from the thread that called `execute`."""

    def started(self, plan: Plan, dashboard: str) -> None: ...
    def advanced(self, written: Written) -> None: ...
    def finished(self) -> None: ...


class Silent:
    """A listener that says nothing."""

    def started(self, plan: Plan, dashboard: str) -> None:
        pass

    def advanced(self, written: Written) -> None:
        pass

    def finished(self) -> None:
        pass


@dataclass(frozen=True)
class Result:
    """What a conversion did. `stages`: seconds and bytes by stage, summed over workers. Sizes in bytes, times in seconds."""

    outputs: tuple[Path, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    stages: Mapping[str, Mapping[str, float]] = field(repr=False)
    up_to_date: bool = False


def execute(plan: Plan, listener: Listener | None = None, *, started: float | None = None) -> Result:
    """Do what a plan says. `started` is when the run began, by time.perf_counter(), where planning is to be counted.

    Raises Interrupted on Ctrl-C or SIGTERM and WriteFailed where the disk or a worker fails; partial files stay `*.partial`.
    """
    started = time.perf_counter() if started is None else started
    outputs = tuple(
        path
        for target in plan.targets
        for path in (*(file.path for file in target.output.files), *(target.output.directory / n for n in ("config.json", "headrace.json")))
    )
    if plan.up_to_date:
        return Result(outputs, 0, 0, time.perf_counter() - started, peak_memory_bytes(), {}, up_to_date=True)
    listener = listener or Silent()
    totals: dict[str, dict[str, float]] = {}
    bytes_read = 0
    try:
        for target in plan.targets:
            target.output.begin()
        with runner(plan) as (run, dashboard):
            listener.started(plan, dashboard)
            for written in run(lower(plan)):
                bytes_read += written.bytes_read
                for (stage, unit), value in written.metrics.items():
                    stage_totals = totals.setdefault(stage, {})
                    stage_totals[unit] = stage_totals.get(unit, 0.0) + value
                listener.advanced(written)
        seconds = time.perf_counter() - started
        for target in plan.targets:
            target.output.finish(plan.provenance({"seconds": round(seconds, 3), "stages": totals}))
    except KeyboardInterrupt:
        places = ", ".join(str(target.output.directory) for target in plan.targets)
        raise Interrupted(f"interrupted; {places} is not complete: run the same command again") from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror or error}{place}; the outputs are not complete: mend this and run the same command again"
        raise WriteFailed(text) from error
    finally:
        listener.finished()
    return Result(outputs, bytes_read, plan.bytes_written, time.perf_counter() - started, peak_memory_bytes(), totals)


Run = Callable[[Graph], "Iterator[Written]"]


@contextmanager
def runner(plan: Plan) -> Iterator[tuple[Run, str]]:
    """A function that runs a graph and yields each task's result as it ends, and the address of the dashboard ("" for none)."""
    scheduler, workers = plan.job.scheduler, plan.budget.workers
    if scheduler == "synchronous":
        yield _run_synchronous, ""
    elif scheduler == "threads":
        yield lambda graph: _run_threads(graph, workers), ""
    elif scheduler == "local":
        with _local_cluster(workers) as client:
            # Dask names the machine's address even where the dashboard listens on this machine alone.
            port = client.scheduler_info()["services"].get("dashboard")
            yield lambda graph: _run_distributed(client, graph), f"http://127.0.0.1:{port}/status" if port else ""
    else:
        from distributed import Client

        try:
            client = Client(scheduler, timeout=10)
        except (OSError, TimeoutError, ValueError) as error:
            raise BadInput([Problem(f"--scheduler {scheduler}", f"no answer ({error})", "a running Dask scheduler")]) from None
        with client:
            yield lambda graph: _run_distributed(client, graph), client.dashboard_link


@contextmanager
def _local_cluster(workers: int) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    # A worker of an in-process cluster may fill the process's memory by our own accounting; it spills nowhere and is never paused.
    settings = {"distributed.worker.memory.spill": False, "distributed.worker.memory.target": False, "distributed.admin.tick.limit": "60s"}
    with dask.config.set(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dashboard port in use: another is taken
        with LocalCluster(
            n_workers=1,
            threads_per_worker=workers,
            processes=False,
            memory_limit=None,
            dashboard_address="127.0.0.1:8787",
            silence_logs=logging.ERROR,
        ) as cluster, Client(cluster) as client:
            yield client


def _run_synchronous(graph: Graph) -> Iterator[Written]:
    import dask

    for key, task in graph.items():
        yield dask.get({key: task}, key)


def _run_threads(graph: Graph, workers: int) -> Iterator[Written]:
    """Threads take the tasks in their order; results come through a queue as tasks end."""
    import queue
    import threading

    import dask.threaded
    from dask.callbacks import Callback

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def started(key: Any, dsk: Any, state: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    def ended(key: Any, value: Any, dsk: Any, state: Any, worker_id: Any) -> None:
        results.put(value)

    def work() -> None:
        try:
            with Callback(pretask=started, posttask=ended):
                dask.threaded.get(graph, list(graph), num_workers=workers)
        except BaseException as error:
            results.put(error)
        else:
            results.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (value := results.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


def _run_distributed(client: Any, graph: Graph) -> Iterator[Written]:
    """Submit a few batches ahead of the work, so that the scheduler's memory does not grow with the model."""
    from distributed import as_completed

    keys = iter(graph)
    waiting = as_completed(with_results=True, raise_errors=True)

    def submit() -> None:
        batch = list(itertools.islice(keys, BATCH))
        if batch:
            waiting.update(client.get({key: graph[key] for key in batch}, batch, sync=False))

    for _ in range(IN_FLIGHT):
        submit()
    done = 0
    try:
        for future, value in waiting:
            future.release()
            done += 1
            if done % BATCH == 0:
                submit()
            yield value
    except BaseException:
        for future in list(waiting.futures):
            future.cancel()
        raise


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far, mapped file pages included (VmHWM)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
