"""A bucket of an S3 server on this machine, which is moto's, and a proxy before it in which a test has things go wrong."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

import stages.read.object_store
from pipeline.tensor import store_requests
from tests.support.http_servers import serving

SECRET = "a-secret-key-of-nobody"
FULL = b"<?xml version='1.0'?><Error><Code>XMinioStorageFull</Code><Message>no room</Message></Error>"


@dataclass
class Proxied:
    """What the proxy does. `requests`: (method, path with query) of each that came.

    `fault`: called with method and path; what it returns goes wrong: a status, "cut" for a connection that breaks off before the
    answer, "full" for a bucket without room; None for nothing.
    """

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    fault: Callable[[str, str], int | str | None] = lambda _method, _path: None

    def uploads(self) -> list[str]:
        """The parts that were uploaded: path and query of each request."""
        return [path for method, path in self.requests if method == "PUT" and "partNumber" in path]


@contextmanager
def s3_server() -> Iterator[Proxied]:
    """Run a server with the bucket `bucket`, and set the environment for it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urlopen(Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    with proxy(f"{host}:{port}") as proxied, pytest.MonkeyPatch.context() as patch:
        keys = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
        for name, value in {**keys, "AWS_ENDPOINT_URL": proxied.url}.items():
            patch.setenv(name, value)
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        forget_clients()
        yield proxied
    server.stop()
    forget_clients()


def empty() -> None:
    """Remove all objects of the bucket, and all uploads that nobody has completed: servers of one process have them in common."""
    s3 = client()
    for each in s3.list_objects_v2(Bucket="bucket").get("Contents", []):
        s3.delete_object(Bucket="bucket", Key=each["Key"])
    for each in s3.list_multipart_uploads(Bucket="bucket").get("Uploads", []):
        s3.abort_multipart_upload(Bucket="bucket", Key=each["Key"], UploadId=each["UploadId"])


def forget_clients() -> None:
    """Have the next requests of this process look at its environment again."""
    for made in (stages.read.object_store._store, store_requests._session, store_requests._client, store_requests._store_of):
        made.cache_clear()


def upload(directory: Path, url: str) -> str:
    """Put the files of a directory below a URL, and return that."""
    parts, s3 = urlsplit(url), client()
    for path in directory.iterdir():
        s3.put_object(Bucket=parts.netloc, Key=f"{parts.path.strip('/')}/{path.name}", Body=path.read_bytes())
    return url


@contextmanager
def proxy(target: str) -> Iterator[Proxied]:
    """Pass requests on to a server at host:port, but for those that are to go wrong."""
    proxied = Proxied()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_expect_100(self) -> bool:
            self.send_response_only(100)
            self.end_headers()
            return True

        def _pass(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            proxied.requests.append((self.command, self.path))
            fault = proxied.fault(self.command, self.path)
            if fault == "cut":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "full":
                self._answer(507, {"Content-Type": "application/xml"}, FULL)
                return
            if isinstance(fault, int):
                self._answer(fault, {}, b"")
                return
            there = http.client.HTTPConnection(target)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
            there.request(self.command, self.path, body, headers)
            answer = there.getresponse()
            data = answer.read()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding")}
            self._answer(answer.status, kept, data, head=self.command == "HEAD")
            there.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815 (the names that the library asks for)

        def _answer(self, status: int, headers: dict[str, str], data: bytes, head: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if head or name.lower() != "content-length":
                    self.send_header(name, value)
            if not head:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not head:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as proxied.url:
        yield proxied


def client() -> Any:
    """botocore's own client of the server, which knows nothing of headrace."""
    import botocore.session

    return botocore.session.get_session().create_client("s3", region_name="us-east-1")


def objects(url: str) -> dict[str, bytes]:
    """The objects below a URL, by their names there."""
    parts, s3 = urlsplit(url), client()
    prefix = parts.path.strip("/") + "/"
    listed = s3.list_objects_v2(Bucket=parts.netloc, Prefix=prefix).get("Contents", [])
    names = [each["Key"] for each in listed]
    return {name[len(prefix) :]: s3.get_object(Bucket=parts.netloc, Key=name)["Body"].read() for name in names}


def open_uploads() -> list[str]:
    """The keys of uploads that are neither complete nor aborted."""
    return [each["Key"] for each in client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])]
