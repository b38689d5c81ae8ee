"""Dask's cluster in this process, as a guest: what belongs to the host is left as it is, also while others run clusters beside it.

Dask's settings, the filters of warnings and the levels of loggers are the process's and not a thread's: to set them for a while and
then to restore them leaves them wrong where two conversions overlap, and changes the host's own work meanwhile. So nothing of them
is set: what a cluster of ours needs otherwise is given to its parts, and what its thread would log is left out by that thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.planning.listen import Listen
from pipeline.watching.sockets import bound

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

    from pipeline.watching.state import RunWatch

PROFILE_MILLISECONDS = 100  # between two looks of a worker at its threads
TICK_MILLISECONDS = 200  # between two looks of a server at its event loop
LOGGERS = ("distributed", "bokeh", "tornado", "asyncio")
STARTING_SECONDS = 5.0  # the most that one cluster's start waits for another's

_starting = threading.Lock()


@contextmanager
def in_process_cluster(
    workers: int, resources: Mapping[str, float] | None = None, watch: RunWatch | None = None, listen: Listen | None = None
) -> Iterator[Any]:
    """A client of a cluster in this process. Raises BadInput where `listen` is given and cannot be had."""
    load_distributed()
    from distributed import Client, LocalCluster
    from distributed.scheduler import DEFAULT_EXTENSIONS
    from distributed.security import Security

    from pipeline.watching.dashboard import attended

    _revive_offload()
    with ExitStack() as stack:
        loop = stack.enter_context(_event_loop())
        starting = stack.enter_context(_one_starts())
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=1,
                threads_per_worker=workers,
                processes=False,
                protocol="inproc://",
                # Nothing of it leaves the process, so that there is nothing to encrypt, whatever a site asks of its clusters.
                security=Security(require_encryption=False),
                loop=loop,
                # Memory is bounded by the plan's own accounting: without a limit the worker neither pauses nor spills.
                memory_limit=None,
                resources=resources,
                lifetime="0s",  # no limit, whatever a site sets for its workers
                dashboard_address=_free_address(listen),
                silence_logs=False,
                scheduler_kwargs={
                    "dashboard": False,
                    # There is nobody to steal from.
                    "extensions": {name: each for name, each in DEFAULT_EXTENSIONS.items() if name != "stealing"},
                },
            )
        )
        starting.close()
        servers = [cluster.scheduler, *cluster.workers.values()]
        stack.callback(_forget_handlers, servers)
        for server in servers:  # Python's lock is taken from the tasks each time
            _slow_down(server)
        client = stack.enter_context(Client(cluster, set_as_default=False))
        # The worker takes tasks by their priority; handing them over a few at a time would cost seconds.
        cluster.scheduler.WORKER_SATURATION = math.inf
        with attended(cluster, watch):
            yield client


@contextmanager
def _one_starts() -> Iterator[ExitStack]:
    """Let one cluster start at a time, so that a port that is free is still free when Dask takes it. Closed when it has started."""
    with ExitStack() as stack:
        # Whoever was forked while another thread held it would wait for ever; then Dask may warn of a port.
        if _starting.acquire(timeout=STARTING_SECONDS):
            stack.callback(_starting.release)
        yield stack


def load_distributed() -> None:
    """Import Dask's distributed, and leave the loggers as they are that are not its own: it sets those of Tornado and Bokeh."""
    if "distributed" in sys.modules:
        return
    manager = logging.Logger.manager
    loggers = [each for name, each in [*manager.loggerDict.items()] if isinstance(each, logging.Logger) and not _of_dask(name)]
    kept = [(each, each.level, each.propagate, [*each.handlers]) for each in loggers]
    import distributed  # noqa: F401

    for logger, level, propagate, handlers in kept:
        logger.setLevel(level)
        logger.propagate = propagate
        for handler in [each for each in logger.handlers if each not in handlers]:
            logger.removeHandler(handler)


def _of_dask(name: str) -> bool:
    return name.partition(".")[0] == "distributed"


def _free_address(listen: Listen | None) -> str:
    """The address of the dashboard: that of `listen`, or the usual one, or another port where that is taken.

    Dask itself would take another port with a warning. Raises BadInput where `listen` is taken.
    """
    wanted = listen or Listen()
    sockets = bound(wanted, or_any_port=listen is None)
    port = sockets[0].getsockname()[1]
    for each in sockets:
        each.close()
    return Listen(wanted.host, port).address


@contextmanager
def _event_loop() -> Iterator[IOLoop]:
    """An event loop in a thread of its own, of which nothing is logged: the run itself reports the failure of a task."""
    from tornado.ioloop import IOLoop

    loops: list[IOLoop] = []
    stop: list[asyncio.Event] = []
    ready = threading.Event()

    async def work() -> None:
        loops.append(IOLoop.current())
        stop.append(asyncio.Event())
        ready.set()
        await stop[0].wait()

    thread = threading.Thread(target=lambda: asyncio.run(work()), name="headrace-cluster", daemon=True)
    thread.start()
    ready.wait()
    silent = _NotOf(thread)
    loggers = [logging.getLogger(name) for name in [*logging.Logger.manager.loggerDict] if name.partition(".")[0] in LOGGERS]
    # Dask's handler sees what comes from loggers that are made later, too.
    places: list[logging.Filterer] = [*loggers, *logging.getLogger("distributed").handlers]
    for place in places:
        place.addFilter(silent)
    try:
        yield loops[0]
    finally:
        loops[0].add_callback(stop[0].set)
        thread.join()
        for place in places:
            place.removeFilter(silent)


class _NotOf(logging.Filter):
    """Leaves out the records of one thread, but for those that are critical."""

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self.ident = thread.ident

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.ident or record.levelno >= logging.CRITICAL


@contextmanager
def attached(client: Any) -> Iterator[Any]:
    """A client of a cluster elsewhere, closed at the end: where it seeks a lost scheduler then, Dask logs nothing of that.

    It would log a traceback, or that the scheduler was sought for as long as it might have been. The run itself reports the loss.
    What Dask logs otherwise, and of clients of the host's, stays.
    """
    thread = client.sync(_its_thread)
    logger = logging.getLogger("distributed.client")

    def unless_given_up(record: logging.LogRecord) -> bool:
        cancelled = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
        return record.thread != thread or not (cancelled or str(record.msg).startswith("Failed to reconnect to scheduler"))

    logger.addFilter(unless_given_up)
    try:
        with client:
            yield client
    finally:
        logger.removeFilter(unless_given_up)


async def _its_thread() -> int:
    return threading.get_ident()


def _slow_down(server: Any) -> None:
    for name, milliseconds in (("profile", PROFILE_MILLISECONDS), ("tick", TICK_MILLISECONDS)):
        if name in server.periodic_callbacks:
            server.periodic_callbacks[name].callback_time = milliseconds


def _forget_handlers(servers: list[Any]) -> None:
    """Take from Dask's loggers the handlers that servers have added, which would stay until the servers are collected."""
    for server in servers:
        handler: Any = getattr(server, "_deque_handler", None)
        for name in ("distributed.scheduler", "distributed.worker"):
            logging.getLogger(name).removeHandler(handler)


def _revive_offload() -> None:
    """Make the thread anew on which Dask unpacks graphs, where this process was forked from one that had it."""
    from distributed import utils

    threads = utils._offload_executor._threads
    if threads and not any(thread.is_alive() for thread in threads):
        utils._offload_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="Dask-Offload")
