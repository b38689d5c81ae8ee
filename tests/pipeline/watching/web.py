"""Asking a server for a page."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping


def fetch(
    address: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> tuple[int, str]:
    """The status and the text of an answer, whatever the status."""
    request = urllib.request.Request(address, method=method, headers=dict(headers or {}), data=body)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def fetch_when_there(address: str) -> str:
    """The text of a page that joins its server in a moment."""
    for _ in range(300):
        status, text = fetch(address)
        if status == 200:
            return text
        assert status == 404
        time.sleep(0.1)
    raise AssertionError(f"{address} is not there")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
