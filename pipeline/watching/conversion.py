"""Serve the page, metrics and health of the one conversion that this process runs.

Nothing of it is loaded before somebody asks for a page: until then there is a socket, or a route, and no server behind it.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from pipeline.errors import Interrupted
from pipeline.planning.listen import EVERYWHERE, PAGE, Listen
from pipeline.watching.sockets import bound
from pipeline.watching.state import RunWatch

PARTING_SECONDS = 1.0  # the most that the end of a run waits for pages that are open


class Viewers:
    """The number of pages that are open: they are shown the end of a run before its process goes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0

    def count(self, change: int) -> None:
        """Add to the number."""
        with self._lock:
            self._open += change

    def part(self) -> None:
        """Wait until the last event has gone to every open page, but not for one that does not take it."""
        end = time.monotonic() + PARTING_SECONDS
        while self._open and time.monotonic() < end:
            time.sleep(0.01)


@contextmanager
def joined(application: Any, watch: RunWatch) -> Iterator[None]:
    """Add the page, `/metrics` and `/health` to a Dask server's application; at the end, open pages are told how the run ended.

    The routes take precedence over Dask's of the same paths.
    """
    viewers = Viewers()
    application.add_handlers(".*", _routes(watch, viewers))
    with _told(watch, viewers):
        yield


@contextmanager
def serving(watch: RunWatch, listen: Listen | None) -> Iterator[str]:
    """Serve the page, `/metrics` and `/health` without a dashboard, and yield the page's URL.

    `listen` is None for the usual address, and for any free port where that is taken. Raises BadInput where the address of `listen`
    is taken or is not this machine's.
    """
    wanted = listen or Listen()
    sockets = bound(wanted, or_any_port=listen is None)
    viewers = Viewers()
    ours, theirs = socket.socketpair()
    work = threading.Thread(
        target=_serve_when_asked, args=(sockets, theirs, watch, viewers, wanted), name="headrace-pages", daemon=True
    )
    work.start()
    try:
        with _told(watch, viewers):
            yield Listen(wanted.host, sockets[0].getsockname()[1]).url + PAGE
    finally:
        ours.close()
        work.join()
        theirs.close()


def health(watch: RunWatch) -> dict[str, Any]:
    """Return the JSON object of `/health`: sizes in bytes, times in seconds."""
    now = watch.snapshot()
    return {
        "status": "ok",
        "state": now.state,
        "outputs": list(now.outputs),
        "bytes": now.done_bytes,
        "total_bytes": now.total_bytes,
        "tasks": now.tasks,
        "done_tasks": now.done_tasks,
        **({"layers": now.layers, "calibrated_layers": now.calibrated_layers} if now.layers else {}),
        "idle_seconds": round(now.idle_seconds, 1),
        "eta_seconds": None if now.eta_seconds is None else round(now.eta_seconds, 1),
        "memory_bytes": now.memory_bytes,
    }


@contextmanager
def _told(watch: RunWatch, viewers: Viewers) -> Iterator[None]:
    """Tell the watch, and through it the open pages, how what is done inside ends."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        watch.end("interrupted")
        raise
    except BaseException:
        watch.end("failed")
        raise
    else:
        watch.end("done")
    finally:
        viewers.part()


def _serve_when_asked(
    sockets: Sequence[socket.socket], stop: socket.socket, watch: RunWatch, viewers: Viewers, listen: Listen
) -> None:
    """Wait for a connection or the end, which comes when the other end of `stop` is closed; serve from the first one on."""
    with selectors.DefaultSelector() as selector:
        for each in (*sockets, stop):
            selector.register(each, selectors.EVENT_READ)
        asked = {key.fileobj for key, _ in selector.select()}
    if stop in asked:
        for each in sockets:
            each.close()
        return
    from pipeline.watching import server  # Tornado takes a tenth of a second to import

    hosts = None if listen.host in EVERYWHERE else server.hosts_of(listen)
    server.serve(sockets, _routes(watch, viewers), stop, hosts)


def _routes(watch: RunWatch, viewers: Viewers) -> list[Any]:
    from pipeline.watching import server
    from pipeline.watching.live import page_routes
    from pipeline.watching.page import ConversionPage

    return [*page_routes(ConversionPage(watch), viewers.count), *server.routes(_metrics(watch), lambda: health(watch))]


def _metrics(watch: RunWatch) -> Callable[[], bytes | None]:
    @cache
    def text() -> Callable[[], bytes] | None:
        try:
            from pipeline.watching.metrics import Metrics, of_conversion
        except ModuleNotFoundError:  # prometheus_client is installed with the extra `jobs`
            return None
        return Metrics(lambda: of_conversion(watch.snapshot())).text

    def answer() -> bytes | None:
        made = text()
        return made() if made else None

    return answer
