"""Serve pages, metrics and health within limits: whoever sends slowly, much, or often costs little, and nobody's work.

Everything here answers GET requests only and changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.web import Application, RedirectHandler, RequestHandler

from pipeline.planning.listen import EVERYWHERE, PAGE, Listen
from pipeline.watching.sockets import bound

Route = tuple[str, type[RequestHandler], dict[str, Any]]
Hosts = Callable[[str], bool]

REDIRECT = (r"/", RedirectHandler, {"url": PAGE, "permanent": False})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_METRICS = "# prometheus_client is not installed: pip install headrace[jobs]\n"
# A request has no body and few headers. Pages that are open are no longer read from, and stay.
MAX_CONNECTIONS = 128
MAX_HEADER_BYTES, MAX_BODY_BYTES = 16 << 10, 1 << 10
IDLE_SECONDS = 15.0


class Guarded(RequestHandler):
    """A handler that answers only those who ask for this server by a name of its own, from no other site's page."""

    def prepare(self) -> None:
        """Refuse a Host that this server is not called by (a name that leads here for a while), and another's Origin."""
        allowed = self.settings.get("hosts")
        host = self.request.host
        if allowed is not None and not allowed(_name(host)):
            self.refuse(421, f"this server is not called {_name(host)!r}: [http] hosts of its schedule names others")
        elif (origin := self.request.headers.get("Origin")) and urlsplit(origin).netloc != host:
            self.refuse(403, "another site's page asks")

    def refuse(self, status: int, text: str) -> None:
        """Answer with what is wrong."""
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{text[:200]}\n")


class MetricsHandler(Guarded):
    """Answers `GET /metrics` with Prometheus's text format; 501 where prometheus_client is not installed."""

    def initialize(self, metrics: Callable[[], bytes | None]) -> None:
        self.metrics = metrics

    def get(self) -> None:
        self.set_header("Content-Type", METRICS_TYPE)
        text = self.metrics()
        if text is None:
            self.set_status(501)
        self.write(NO_METRICS if text is None else text)


class HealthHandler(Guarded):
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


def hosts_of(listen: Listen, more: Sequence[str] = ()) -> Hosts:
    """Return what says whether a Host is one of this server's: its address, this machine's names, addresses, and `more`."""
    names = {"localhost", listen.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower(), *map(str.lower, more)}

    def allowed(host: str) -> bool:
        if host.lower() in names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # A name that leads here is the danger, not an address.
        return listen.host in EVERYWHERE or address.is_loopback

    return allowed


class _Server(HTTPServer):
    """A server with so many connections at most; further ones are closed at once."""

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            stream.close()
        else:
            super().handle_stream(stream, address)


def serve(sockets: Sequence[socket.socket], extra: Sequence[Route], stop: socket.socket, hosts: Hosts | None) -> None:
    """Answer for routes on sockets that listen, in this thread, until the other end of `stop` is closed. `/` leads to the page.

    `hosts`: the names that it is asked for by; None for any.
    """

    async def work() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(stop, ended.set)
        # What strangers send wrong is not worth a line each.
        for name in ("tornado.access", "tornado.general"):
            logging.getLogger(name).setLevel(logging.ERROR)
        limits = {"max_header_size": MAX_HEADER_BYTES, "max_body_size": MAX_BODY_BYTES, "body_timeout": IDLE_SECONDS}
        server = _Server(Application([REDIRECT, *extra], hosts=hosts), idle_connection_timeout=IDLE_SECONDS, **limits)
        server.add_sockets(sockets)
        await ended.wait()
        server.stop()
        await server.close_all_connections()

    asyncio.run(work())


@contextmanager
def serving(listen: Listen, extra: Sequence[Route], *, or_any_port: bool = False, names: Sequence[str] = ()) -> Iterator[str]:
    """Serve routes from a thread while the context lasts, and yield the server's URL. `/` redirects to the page.

    `or_any_port`: take any free port where the port of `listen` is taken. `names`: further hosts that it is called. Raises BadInput
    where the address cannot be used.
    """
    sockets = bound(listen, or_any_port)
    ours, theirs = socket.socketpair()
    arguments = (sockets, extra, theirs, hosts_of(listen, names))
    thread = threading.Thread(target=serve, args=arguments, name="headrace-pages", daemon=True)
    thread.start()
    try:
        yield Listen(listen.host, sockets[0].getsockname()[1]).url
    finally:
        ours.close()
        thread.join(5)
        theirs.close()


def _name(host: str) -> str:
    """The host without its port."""
    return urlsplit(f"//{host}").hostname or ""
