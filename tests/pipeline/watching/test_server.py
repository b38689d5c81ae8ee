"""What strangers may do to the server of pages: connect often, send slowly, much or in another's name."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.errors import BadInput
from pipeline.planning.listen import Listen
from pipeline.watching import server
from pipeline.watching.live import page_routes
from pipeline.watching.server import Route, hosts_of, routes, serving
from tests.pipeline.watching.web import fetch, free_port


class Subject:
    """A page whose content is said by the test."""

    def __init__(self) -> None:
        self.text, self.has_ended, self.viewers = "begun", False, 0

    def look(self) -> tuple[str, str, bool]:
        return f"<p>{self.text}</p>", self.text, self.has_ended

    def count(self, change: int) -> None:
        self.viewers += change


@pytest.fixture
def subject() -> Subject:
    return Subject()


def all_routes(subject: Subject) -> list[Route]:
    return [*page_routes(subject, subject.count), *routes(lambda: b"x 1\n", lambda: {"status": "ok"})]


@contextlib.contextmanager
def served(subject: Subject, host: str = "127.0.0.1", **more: Any) -> Iterator[tuple[str, int]]:
    port = free_port()
    with serving(Listen(host, port), all_routes(subject), **more) as base:
        yield base, port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def closed(stream: socket.socket) -> bool:
    """Whether the other end closes it, after what it may have to say."""
    with contextlib.suppress(ConnectionResetError):
        while stream.recv(1 << 16):
            pass
    return True


def test_its_pages(subject: Subject) -> None:
    with served(subject) as (base, _):
        page = fetch(f"{base}/")[1]
        assert "<p>begun</p>" in page
        assert fetch(f"{base}/metrics") == (200, "x 1\n")
        assert json.loads(fetch(f"{base}/health")[1]) == {"status": "ok"}
        assert fetch(f"{base}/gone")[0] == 404
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert fetch(f"{base}/headrace", method)[0] == 405
        with urllib.request.urlopen(f"{base}/headrace", timeout=30) as answer:
            policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "script-src 'sha256-" in policy


def test_more_connections_than_there_may_be_are_closed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with served(subject) as (base, port), contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(port)) for _ in range(3)]
        for each in held:
            each.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert each.recv(12) == b"HTTP/1.1 200"
        with connected(port) as one_more:
            assert closed(one_more)
        held.pop().close()
        end = time.monotonic() + 20
        while True:  # there is room again in a moment
            with contextlib.suppress(OSError):
                assert fetch(f"{base}/health")[0] == 200
                break
            assert time.monotonic() < end


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /headrace HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["nothing", "half a header", "half a body", "no second request"],
)
def test_who_sends_slowly_is_dropped(subject: Subject, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.3)
    with served(subject) as (_, port), connected(port) as slow:
        slow.sendall(sent)
        begun = time.monotonic()
        assert closed(slow)
        assert 0.2 < time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000,
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (20 << 10) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
    ],
    ids=["body", "chunks", "header", "no HTTP"],
)
def test_more_than_a_request_may_hold_is_not_read(subject: Subject, sent: bytes) -> None:
    with served(subject) as (base, port):
        with connected(port) as much, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            much.sendall(sent)
            said = much.recv(1 << 16)
            assert b"200 OK" not in said
            assert closed(much)
        assert fetch(f"{base}/health")[0] == 200


@pytest.mark.parametrize("path", ["/headrace", "/headrace/live", "/metrics", "/health"])
def test_only_by_its_own_names_and_from_no_other_sites_page(subject: Subject, path: str) -> None:
    subject.has_ended = True  # so that the stream ends, too
    with served(subject, names=["gpu.lan"]) as (base, port):
        for host in ("127.0.0.1", f"localhost:{port}", "[::1]:9999", socket.gethostname(), "gpu.lan", "GPU.lan:80"):
            assert fetch(base + path, headers={"Host": host})[0] == 200, host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "192.0.2.1", ""):
            assert fetch(base + path, headers={"Host": host})[0] in (400, 421), host
        assert fetch(base + path, headers={"Origin": base})[0] == 200
        for origin in ("http://evil.example", "null", f"http://localhost:{port}", f"http://127.0.0.1:{port + 1}"):
            assert fetch(base + path, headers={"Origin": origin})[0] == 403, origin


@pytest.mark.parametrize(
    ("listen", "host", "allowed"),
    [
        (Listen(), "127.0.0.1", True),
        (Listen(), "localhost", True),
        (Listen(), "127.9.9.9", True),
        (Listen(), "evil.example", False),
        (Listen(), "192.0.2.1", False),
        (Listen("gpu.lan", 8787), "gpu.lan", True),
        (Listen("gpu.lan", 8787), "evil.example", False),
        (Listen("0.0.0.0", 8787), "192.0.2.1", True),
        (Listen("0.0.0.0", 8787), "evil.example", False),
    ],
)
def test_hosts(listen: Listen, host: str, allowed: bool) -> None:
    assert hosts_of(listen)(host) is allowed


def test_a_page_that_is_open_is_told_what_changes_and_then_the_end(subject: Subject) -> None:
    events: list[dict[str, Any]] = []

    def read() -> None:
        with urllib.request.urlopen(f"{base}/headrace/live", timeout=30) as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    events.append(json.loads(line[6:]))

    with served(subject) as (base, _):
        reader = threading.Thread(target=read)
        reader.start()
        end = time.monotonic() + 20
        while not events:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert subject.viewers == 1
        subject.text, subject.has_ended = "over </script>", True
        reader.join(20)
    assert events[0] == {"body": "<p>begun</p>", "title": "begun", "ended": False}
    assert events[-1] == {"body": "<p>over </script></p>", "title": "over </script>", "ended": True}
    assert subject.viewers == 0


def test_a_page_that_is_closed_is_not_counted(subject: Subject) -> None:
    with served(subject) as (_, port):
        with connected(port) as stream:
            stream.sendall(b"GET /headrace/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert stream.recv(12) == b"HTTP/1.1 200"
            assert subject.viewers == 1
        end = time.monotonic() + 20
        while subject.viewers:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_an_end_with_open_pages_takes_no_time(subject: Subject) -> None:
    with contextlib.ExitStack() as stack:
        with served(subject) as (_, port):
            open_page = stack.enter_context(connected(port))
            open_page.sendall(b"GET /headrace/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert open_page.recv(12) == b"HTTP/1.1 200"
            stack.enter_context(connected(port))
            begun = time.monotonic()
        assert time.monotonic() - begun < 4
    assert not [each for each in threading.enumerate() if each.name == "headrace-pages"]


def test_an_address_that_is_taken(subject: Subject) -> None:
    with served(subject) as (base, port):
        with pytest.raises(BadInput, match=f"--listen 127.0.0.1:{port}: found"), serving(Listen(port=port), []):
            pass
        with serving(Listen(port=port), all_routes(subject), or_any_port=True) as other:
            assert other != base
            assert fetch(f"{other}/health")[0] == 200
