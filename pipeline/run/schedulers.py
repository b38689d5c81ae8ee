"""The Dask schedulers that a plan runs on: threads, synchronous, an in-process cluster with its dashboard, a cluster elsewhere.

Each is a function that runs a graph and yields the tasks' results as they end.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.planning.listen import Listen
from pipeline.run.lower import Graph

if TYPE_CHECKING:
    from pipeline.watching.state import RunWatch
    from stages.write import Written

BATCH = 64  # tasks submitted at once
IN_FLIGHT = 3  # batches that the scheduler knows of

Run = Callable[[Graph], "Iterator[Written]"]


class Session(NamedTuple):
    """A scheduler at hand. `run` runs a graph; `dashboard` is its address, "" for none; `client`, where it has one, is Dask's."""

    run: Run
    dashboard: str = ""
    client: Any = None

    def offers(self, resources: Mapping[str, float]) -> bool:
        """Whether a worker is there that has these resources; a scheduler without workers of its own has all."""
        if self.client is None:
            return True
        offered = [worker["resources"] for worker in self.client.scheduler_info()["workers"].values()]
        return any(all(has.get(name, 0) >= amount for name, amount in resources.items()) for has in offered)

    def run_with(self, resources: Mapping[str, float], graph: Graph) -> Iterator[Any]:
        """Run tasks that each take these resources of a worker, and wait for such a worker; without workers, one at a time."""
        if self.client is None:
            return run_synchronous(graph)
        return run_distributed(self.client, graph, resources)


@contextmanager
def runner(
    scheduler: str,
    workers: int,
    resources: Mapping[str, float] | None = None,
    watch: RunWatch | None = None,
    listen: Listen | None = None,
    report: Path | None = None,
) -> Iterator[Session]:
    """Open a session with `scheduler`; `resources` are those of the in-process cluster's worker.

    `watch` is what headrace's page shows: beside the dashboard of a cluster of our own, or at `listen`. `report`: a file for Dask's
    performance report. Raises BadInput where a scheduler elsewhere does not answer, or `listen` is taken.
    """
    if scheduler == "local":
        with _local_cluster(workers, resources, watch, listen) as client, _report(report):
            # Dask names the machine's address even where the dashboard listens on this machine alone.
            port = client.scheduler_info()["services"].get("dashboard")
            url = Listen((listen or Listen()).host, port).url
            dashboard = f"{url}/status" if port else ""
            yield Session(lambda graph: run_distributed(client, graph, here=True), dashboard, client)
    elif scheduler in ("threads", "synchronous"):
        run = run_synchronous if scheduler == "synchronous" else lambda graph: run_threads(graph, workers)
        with _page(watch, listen) as page:
            yield Session(run, page)
    else:
        with _page(watch, listen), _remote(scheduler) as client, _report(report):
            yield Session(lambda graph: run_distributed(client, graph), client.dashboard_link, client)


def run_synchronous(graph: Graph) -> Iterator[Written]:
    """One task after another in this thread: the debugger's scheduler."""
    import dask

    for key, task in graph.items():
        yield dask.get({key: task}, key)


def run_threads(graph: Graph, workers: int) -> Iterator[Written]:
    """Dask's threads take the tasks in the order of its own choice; results come through a queue as tasks end."""
    import dask.threaded
    from dask.callbacks import Callback

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def before(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    def work() -> None:
        try:
            with Callback(pretask=before, posttask=lambda *ended: results.put(ended[1])):
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


def run_distributed(
    client: Any, graph: Graph, resources: Mapping[str, float] | None = None, here: bool = False
) -> Iterator[Written]:
    """Submit a few batches ahead of the work, so that the scheduler's memory does not grow with the model.

    `resources`: of a worker, that a task takes while it runs. `here`: the workers are in this process, so that tasks need not be
    copied to them.
    """
    from distributed import CancelledError, KilledWorker, as_completed

    tasks = iter(graph.items())
    waiting = as_completed(with_results=True, raise_errors=True)
    submitted: list[int] = []

    def submit() -> None:
        batch = dict(itertools.islice(tasks, BATCH))
        if batch:
            # Keys are given and results are wanted once: hashing what each task is made of would take longer than scheduling it.
            held = [(_Here if here else _Held)(task) for task in batch.values()]
            submitted.extend(map(id, held))
            waiting.update(client.map(_call, held, key=list(batch), pure=False, resources=resources))

    for _ in range(IN_FLIGHT):
        submit()
    try:
        for done, (future, value) in enumerate(waiting, 1):
            if isinstance(value, CancelledError):  # the scheduler is gone, or forgot the task
                raise value
            future.release()
            if done % BATCH == 0:
                submit()
            yield value
    except (KilledWorker, CancelledError) as error:
        raise WriteFailed(
            f"the cluster lost a worker ({error}); the outputs are not complete: run the same command again"
        ) from error
    finally:
        for future in list(waiting.futures):
            future.cancel()
        for number in submitted:
            _HERE.pop(number, None)


class _Held:
    """A task as a plain value, which Dask does not look into."""

    def __init__(self, task: Any) -> None:
        self.task = task


class _Here(_Held):
    """The same for workers in this process, who find the task where it is: pickling one takes longer than scheduling it."""

    def __reduce__(self) -> tuple[Callable[[int], _Here], tuple[int]]:
        _HERE[id(self)] = self
        return _find, (id(self),)


_HERE: dict[int, _Here] = {}  # until they have run


def _find(number: int) -> _Here:
    return _HERE[number]


def _call(held: _Held) -> Any:
    try:
        return held.task()
    finally:
        _HERE.pop(id(held), None)


@contextmanager
def _local_cluster(
    workers: int, resources: Mapping[str, float] | None = None, watch: RunWatch | None = None, listen: Listen | None = None
) -> Iterator[Any]:
    """A client of a cluster in this process. Raises BadInput where `listen` is given and cannot be had."""
    import dask
    from distributed import Client, LocalCluster

    from pipeline.watching.dashboard import attend

    if listen:
        from pipeline.watching.server import bound

        for sock in bound(listen):  # Dask would take another port without a word
            sock.close()
    # A task's failure is reported by the command, in its own words.
    logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)
    settings = {
        # Memory is bounded by the plan's own accounting: the worker neither pauses nor spills.
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
        # The scheduler's thread takes Python's lock from the tasks each time that it looks at them; there is nobody to steal from.
        "distributed.worker.profile.interval": "100ms",
        "distributed.admin.tick.interval": "200ms",
        "distributed.scheduler.work-stealing": False,
    }
    with dask.config.set(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dashboard port in use: another is taken
        with (
            LocalCluster(
                n_workers=1,
                threads_per_worker=workers,
                processes=False,
                memory_limit=None,
                resources=resources,
                dashboard_address=(listen or Listen()).address,
                silence_logs=logging.ERROR,
                scheduler_kwargs={"dashboard": False},
            ) as cluster,
            Client(cluster) as client,
        ):
            attend(cluster, watch, listen)
            yield client


def _page(watch: RunWatch | None, listen: Listen | None) -> AbstractContextManager[str]:
    """The address of headrace's page on a server of its own; "" where no `listen` asks for one."""
    if watch is None or listen is None:
        return nullcontext("")
    from pipeline.watching import conversion

    return conversion.serving(watch, listen)


def _report(path: Path | None) -> AbstractContextManager[None]:
    """Dask's performance report of what the current client runs, whole in one file, so that it can be read without a network."""
    if path is None:
        return nullcontext()
    from distributed import performance_report

    report: AbstractContextManager[None] = performance_report(filename=str(path), mode="inline")
    return report


@contextmanager
def _remote(address: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise BadInput([Problem(f"--scheduler {address}", f"no answer ({error})", "a running Dask scheduler")]) from None
    with client:
        yield client
