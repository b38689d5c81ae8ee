"""Serve metrics and health, and pages that are Bokeh documents, on a server of their own.

Everything here answers GET requests only and changes nothing.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application, RedirectHandler, RequestHandler

from pipeline.planning.listen import PAGE, Listen
from pipeline.watching.sockets import bound

Page = Callable[[Any], None]
Route = tuple[str, type[RequestHandler], dict[str, Any]]

REDIRECT = (r"/", RedirectHandler, {"url": PAGE, "permanent": False})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_METRICS = "# prometheus_client is not installed: pip install headrace[jobs]\n"


class MetricsHandler(RequestHandler):
    """Answers `GET /metrics` with Prometheus's text format; 501 where prometheus_client is not installed."""

    def initialize(self, metrics: Callable[[], bytes | None]) -> None:
        self.metrics = metrics

    def get(self) -> None:
        self.set_header("Content-Type", METRICS_TYPE)
        text = self.metrics()
        if text is None:
            self.set_status(501)
        self.write(NO_METRICS if text is None else text)


class HealthHandler(RequestHandler):
    """Answers `GET /health` with a JSON object; the status is 503 where its `status` is not "ok"."""

    def initialize(self, health: Callable[[], Mapping[str, Any]]) -> None:
        self.health = health

    def get(self) -> None:
        answer = dict(self.health())
        self.set_status(200 if answer["status"] == "ok" else 503)
        self.write(answer)


def routes(metrics: Callable[[], bytes | None], health: Callable[[], Mapping[str, Any]]) -> list[Route]:
    """Return the routes `/metrics` and `/health`; where `metrics` gives None, `/metrics` says which package is not installed."""
    return [(r"/metrics", MetricsHandler, {"metrics": metrics}), (r"/health", HealthHandler, {"health": health})]


def pages_application(pages: Mapping[str, Page], listen: Listen, more: Sequence[Any] = ()) -> Any:
    """Return a Bokeh application for Tornado, not yet started.

    Parameters
    ----------
    pages
        A function that fills a Bokeh document, for each path.
    listen
        The address of the server, which says the origins that may open websockets to it.
    more
        Further Tornado routes.
    """
    from bokeh.application import Application as BokehApplication
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.tornado import BokehTornado

    applications = {path: BokehApplication(FunctionHandler(fill)) for path, fill in pages.items()}
    return BokehTornado(
        applications,
        extra_patterns=[*more],
        extra_websocket_origins=listen.origins,
        absolute_url="",
        use_index=False,
        check_unused_sessions_milliseconds=5000,
        unused_session_lifetime_milliseconds=10000,
        stats_log_frequency_milliseconds=3_600_000,
    )


def serve(sockets: Sequence[socket.socket], extra: Sequence[Route], stop: socket.socket) -> None:
    """Answer for routes on sockets that listen, in this thread, until the other end of `stop` is closed. `/` leads to the page."""

    async def work() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(stop, ended.set)
        server = HTTPServer(Application([REDIRECT, *extra]))
        server.add_sockets(sockets)
        await ended.wait()
        server.stop()
        await server.close_all_connections()

    asyncio.run(work())


@contextmanager
def serving(listen: Listen, pages: Mapping[str, Page], extra: Sequence[Any], *, or_any_port: bool = False) -> Iterator[str]:
    """Serve pages and routes from a thread while the context lasts, and yield the server's URL. `/` redirects to the page.

    `or_any_port`: take any free port where the port of `listen` is taken. Raises BadInput where the address cannot be used.
    """
    sockets = bound(listen, or_any_port)
    actual = Listen(listen.host, sockets[0].getsockname()[1])
    loops: list[asyncio.AbstractEventLoop] = []
    stop: list[asyncio.Event] = []
    ready = threading.Event()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        stop.append(asyncio.Event())
        bokeh = pages_application(pages, actual, [REDIRECT, *extra])
        bokeh.initialize(IOLoop.current())
        bokeh.start()
        server = HTTPServer(bokeh)
        server.add_sockets(sockets)
        ready.set()
        await stop[0].wait()
        server.stop()
        bokeh.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="headrace-pages", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield actual.url
    finally:
        loops[0].call_soon_threadsafe(stop[0].set)
        thread.join()
