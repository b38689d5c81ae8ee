"""A receiver of notifications on this machine, which answers as it is told and keeps what it was sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.support.http_servers import serving


@dataclass
class Receiver:
    """`answers` are the statuses of the first requests; those after them get 200."""

    answers: list[int]
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=30), f"{len(self.bodies)} of {count} requests"


@contextlib.contextmanager
def receiving(*answers: int) -> Iterator[Receiver]:
    receiver = Receiver(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(receiver.answers.pop(0) if receiver.answers else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            receiver.arrived.release()

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as address:
        receiver.url = f"{address}/hook"
        yield receiver
