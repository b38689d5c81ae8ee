"""The Dask schedulers that a plan runs on: threads, synchronous, an in-process cluster with its dashboard, a cluster elsewhere.

Each is a function that runs a graph and yields the tasks' results as they end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.planning.dask_graph import Priorities, StageGraph
from pipeline.planning.dask_settings import settings_problems
from pipeline.planning.listen import Listen
from pipeline.run.cluster import attached, in_process_cluster, load_distributed
from pipeline.run.sealed import sealed
from pipeline.run.threads import FAILING_SECONDS, LEAVING_SECONDS, threaded
from pipeline.watching.conversion import serving

if TYPE_CHECKING:
    from pipeline.watching.state import RunWatch

Graph = StageGraph | Mapping[Any, Any]  # of a plan, or tasks by key
Results = Generator[Any, None, None]  # of tasks, as they end; closed, what is at work is waited for, up to a time
Run = Callable[[Graph], Results]

POLL_SECONDS = 0.05  # between two looks at whether tasks have ended


class Lost(NamedTuple):
    """The result of a build that Dask has lost with its workers: `name` is the second part of the task's key, `why` for people."""

    name: str
    why: str
    code: int = 1
    seconds: float = 0.0


class Session(NamedTuple):
    """A scheduler at hand. `run` runs a graph; `dashboard` is its address, "" for none; `client`, where it has one, is Dask's."""

    run: Run
    dashboard: str = ""
    client: Any = None

    def offers(self, resources: Mapping[str, float]) -> bool:
        """Whether a worker is there that has these resources; a scheduler without workers of its own has all."""
        if self.client is None:
            return True
        offered = [worker["resources"] for worker in self.client.scheduler_info(n_workers=-1)["workers"].values()]
        return any(all(has.get(name, 0) >= amount for name, amount in resources.items()) for has in offered)

    def run_with(self, resources: Mapping[str, float], graph: Graph) -> Results:
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
    cluster: Mapping[str, Any] | None = None,
) -> Iterator[Session]:
    """Open a session with `scheduler`, or with the cluster that a [cluster] table names.

    `resources` are those of the in-process cluster's worker.

    `watch` is what headrace's page shows: beside the dashboard of a cluster of our own, at `listen`, or for runs in this process at
    the usual address where that is free. `report`: a file for Dask's performance report. Raises BadInput where a scheduler
    elsewhere does not answer, `listen` is taken, or Dask's settings cannot be read.
    """
    if problems := settings_problems():
        raise BadInput(problems)
    if scheduler == "local" and not cluster:
        with in_process_cluster(workers, resources, watch, listen) as client, _report(client, report):
            # Dask names the machine's address even where the dashboard listens on this machine alone.
            port = client.scheduler_info()["services"].get("dashboard")
            url = Listen((listen or Listen()).host, port).url
            dashboard = f"{url}/status" if port else ""
            yield Session(lambda graph: run_distributed(client, graph), dashboard, client)
    elif scheduler in ("threads", "synchronous"):
        run = run_synchronous if scheduler == "synchronous" else lambda graph: run_threads(graph, workers)
        with _page(watch, listen) as page:
            yield Session(run, page)
    else:
        with _page(watch if listen else None, listen), elsewhere(scheduler, cluster) as client, _report(client, report):
            yield Session(lambda graph: run_distributed(client, graph), dashboard_link(client), client)


def thread_name(number: int) -> str:
    """The name of a group in the keys of tasks that Dask's threads run: they order equals by their names, the last first."""
    return f"{999_999 - number:06d}"


def _tasks(graph: Graph) -> tuple[dict[Any, Any], frozenset[Any]]:
    """The tasks of a graph, and the keys of those whose results are wanted."""
    if isinstance(graph, StageGraph):
        return graph.tasks, frozenset(graph.results)
    return dict(graph), frozenset(graph)


def run_synchronous(graph: Graph) -> Results:
    """One task after another in this thread: the debugger's scheduler.

    A plan's graph runs in the order that Dask's threads would take, other tasks, which depend on none, in the order given.
    """
    from dask.order import order

    tasks, wanted = _tasks(graph)
    readers = dict.fromkeys(tasks, 0)
    for task in tasks.values():
        for dependency in task.dependencies:
            readers[dependency] += 1
    values: dict[Any, Any] = {}
    for key in sorted(tasks, key=order(tasks).__getitem__) if isinstance(graph, StageGraph) else tasks:
        task = tasks[key]
        value = task({dependency: values[dependency] for dependency in task.dependencies})
        if readers[key]:
            values[key] = value
        for dependency in task.dependencies:
            readers[dependency] -= 1
            if not readers[dependency]:
                del values[dependency]
        if key in wanted:
            yield value


def run_threads(graph: Graph, workers: int) -> Results:
    """Run tasks on Dask's threads, in the order of its own choice; results come through a queue as tasks end."""
    tasks, wanted = _tasks(graph)
    return threaded(tasks, wanted, workers, graph.halt if isinstance(graph, StageGraph) else None)


def run_distributed(client: Any, graph: Graph, resources: Mapping[str, float] | None = None) -> Results:
    """Submit a graph whole, and give results as they end; a build that Dask lost with its workers is `Lost`.

    Every task's future is kept until the end, so that Dask's Progress counts all tasks of the plan: results are small.
    `resources`: of a worker, that each task takes while it runs.
    """
    from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
    from distributed import CancelledError, KilledWorker, as_completed

    tasks, wanted = _tasks(graph)
    if not tasks:
        return
    if isinstance(graph, StageGraph):
        layers = {
            name: {key: sealed(task, "" if name == "build" else graph.admission) for key, task in layer.items()}
            for name, layer in graph.layers.items()
        }
        layered = StageGraph(layers, graph.places).highlevel()
    else:  # in the order given
        places = Priorities({key: -place for place, key in enumerate(tasks)})
        layered = HighLevelGraph({"tasks": MaterializedLayer(tasks, annotations={"priority": places})}, {"tasks": set()})
    futures = client.get(layered, list(tasks), sync=False, resources=resources)
    patience = LEAVING_SECONDS
    try:
        ended = as_completed([f for f in futures if f.key in wanted], loop=client.loop, with_results=True, raise_errors=False)
        for future, value in ended:
            if isinstance(value, CancelledError):  # the scheduler is gone, or forgot the task
                raise value
            if future.status != "error":
                yield value
            elif future.key[0] == "build":  # no conversion ends with it
                yield Lost(future.key[1], str(value[1]))
            else:
                patience = FAILING_SECONDS
                raise value[1].with_traceback(value[2])
        patience = 0.0
    except (KilledWorker, CancelledError) as error:
        lost = "a worker" if isinstance(error, KilledWorker) else "its scheduler"
        said = " ".join(str(error).split())
        raise WriteFailed(f"the cluster lost {lost} ({said}); the outputs are not complete: run the same command again") from error
    finally:
        at_work = [future.key for future in futures if not future.done() and future.key[0] != "build"] if patience else []
        client.cancel(futures)
        if at_work:
            _await_end(client, at_work, patience)


def _await_end(client: Any, keys: Collection[Any], seconds: float) -> None:
    """Wait until no worker has any of these tasks, which are cancelled, for some `seconds` at most: what runs cannot be stopped.

    What a task is at work on is not to be removed, or another's, before it has ended.
    """
    end, clear = time.monotonic() + seconds, 0
    while clear < 2 and client.status == "running" and (left := end - time.monotonic()) > 0:
        try:
            answers = client.sync(client._run, _has_tasks, keys, on_error="ignore", callback_timeout=left)
        except (OSError, TimeoutError):  # of a scheduler that is lost, or a worker that hangs
            return
        # The scheduler may have handed over a task just then, before it heard of the end.
        clear = 0 if any(answers.values()) else clear + 1
        time.sleep(POLL_SECONDS)


def _has_tasks(keys: Collection[Any], dask_worker: Any) -> bool:
    return any(key in dask_worker.state.tasks for key in keys)


def _page(watch: RunWatch | None, listen: Listen | None) -> AbstractContextManager[str]:
    """The address of headrace's page on a server of its own; "" where it has none."""
    return nullcontext("") if watch is None else serving(watch, listen)


@contextmanager
def _report(client: Any, path: Path | None) -> Iterator[None]:
    """Dask's performance report of what a client runs, whole in one file, so that it can be read without a network.

    Dask's own context manager asks for the process's default client, which ours is not.
    """
    if path is None:
        yield
        return
    began = time.time()
    count = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.monitor.count)
    client.get_task_stream(start=0, stop=0)  # has the scheduler keep it from here on
    try:
        yield
    finally:
        if client.status == "running":  # where the scheduler is lost, there is no report, and the run says why it ended
            page = client.sync(client.scheduler.performance_report, start=began, last_count=count, code="", mode="inline")
            path.write_text(page)


@contextmanager
def elsewhere(address: str, cluster: Mapping[str, Any] | None = None, seconds: float = 10.0) -> Iterator[Any]:
    """A client of the cluster at an address, or of one started by a [cluster] table.

    Raises BadInput where none answers within some `seconds`.
    """
    from pipeline.run.named_cluster import named_cluster, security

    if cluster and "class" in cluster:
        with named_cluster(cluster) as client:
            yield client
        return
    load_distributed()
    from distributed import Client

    tls = {"security": security(cluster["tls"])} if cluster else {}
    try:
        client = Client(address, timeout=seconds, set_as_default=False, **tls)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
        raise BadInput([Problem(f"--scheduler {address}", f"no answer ({error})", "a running Dask scheduler")]) from None
    with attached(client):
        yield client


def dashboard_link(client: Any) -> str:
    """The address of a cluster's dashboard; "" where its site's setting for that names what is not set here."""
    try:
        return client.dashboard_link or ""
    except (LookupError, ValueError):
        return ""
