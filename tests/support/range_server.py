"""A web server of a directory that answers ranges of bytes, and whatever a test wants to go wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

from tests.support.http_servers import serving


@dataclass
class Served:
    """A directory at `url`. `requests`: (method, name, first byte, last byte) of each; `etags`, `times`: whether it says any;
    `weak`: whether its ETags are weak ones, which fulfil no condition (RFC 9110, 13.1.1).

    `faults`: what the next requests of weights get instead, the first first: a status, or "cut" for half of the bytes. `echo`: a
    status that all requests get, with their own headers in the answer, as some servers do to explain themselves.
    """

    url: str = ""
    etags: bool = True
    times: bool = True
    weak: bool = False
    token: str = ""
    echo: int = 0
    requests: list[tuple[str, str, int, int]] = field(default_factory=list)
    faults: list[int | str] = field(default_factory=list)


def etag_of(path: Path) -> str:
    """An ETag as web servers make them, of what a file system says of a file, and of which file it is."""
    status = path.stat()
    return f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'


@contextmanager
def range_server(directory: Path) -> Iterator[Served]:
    """Serve a directory while the context lasts."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            if served.echo:
                self._status(served.echo, f"<Error><Code>AccessDenied</Code>{self.path} {self.headers}</Error>".replace("\n", " "))
                return
            place, _, query = self.path.partition("?")
            if "list-type=2" in query:
                self._list(place.strip("/"), unquote(dict(each.split("=") for each in query.split("&"))["prefix"]))
                return
            path = directory / place.lstrip("/")
            if served.token and self.headers.get("Authorization") != f"Bearer {served.token}":
                self._status(401)
                return
            if not path.is_file():
                self._status(404)
                return
            etag, size = etag_of(path), path.stat().st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(found[1]), min(int(found[2]), size - 1)) if found else (0, size - 1)
            served.requests.append((self.command, path.name, first, last))
            fault = served.faults.pop(0) if served.faults and path.suffix == ".safetensors" else None
            if isinstance(fault, int):
                self._status(fault)
                return
            if self.headers.get("If-Match") not in ((None,) if served.weak else (None, etag)):
                self._status(412)
                return
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(last - first + 1))
            if served.times:
                self.send_header("Last-Modified", formatdate(int(path.stat().st_mtime), usegmt=True))
            if found:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            if served.etags:
                self.send_header("ETag", f"W/{etag}" if served.weak else etag)
            self.end_headers()
            if self.command == "GET":
                with path.open("rb") as file:
                    file.seek(first)
                    part = file.read(last + 1 - first)
                self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
                if fault == "cut":
                    self.close_connection = True
                    self.connection.close()

        def _list(self, bucket: str, prefix: str) -> None:
            """Answer as S3 lists the objects of a bucket below a prefix."""
            found = [path for path in sorted((directory / bucket / prefix).glob("*")) if path.is_file()]
            rows = [
                f"<Contents><Key>{prefix}{path.name}</Key><Size>{path.stat().st_size}</Size>"
                f"<LastModified>{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
                f"<ETag>{etag_of(path)}</ETag></Contents>"
                for path in found
            ]
            text = f"<Name>{bucket}</Name><KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>{''.join(rows)}"
            self._status(200, f'<?xml version="1.0"?><ListBucketResult>{text}</ListBucketResult>')

        def _status(self, status: int, text: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as served.url:
        yield served
