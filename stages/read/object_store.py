"""Objects in object storage and on web servers: what is there, and ranges of their bytes.

Requests are made again where that may help, and on the condition that an object is still the one that it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import SourceChanged
from pipeline.tensor.store_requests import open_store, said

ATTEMPTS, FIRST_PAUSE_SECONDS = 6, 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Object:
    """An object as it was when the checkpoint was opened. `etag`: "" where its server has none."""

    name: str
    size_bytes: int
    mtime: float
    etag: str


def fetch_range(url: str, name: str, start: int, end: int, etag: str) -> Any:
    """The bytes [start, end) of an object below a URL, as a buffer, if it still has this ETag ("": whatever it has).

    A weak ETag (W/...) fulfils no condition of a server: it is held against that of the answer. Raises SourceChanged where it has
    another, and OSError where it cannot be read after ATTEMPTS.
    """
    import obstore
    from obstore.exceptions import PreconditionError

    strong = bool(etag) and not etag.startswith("W/")
    options: Any = {"range": (start, end), **({"if_match": etag} if strong else {})}

    def answer() -> tuple[str, Any]:
        result = obstore.get(_store(url), name, options=options)
        return result.meta.get("e_tag") or "", result.bytes()

    try:
        now, data = _again(answer, f"{url}/{name}")
    except (PreconditionError, FileNotFoundError):
        raise SourceChanged([f"{url}/{name} (another object than the one that was opened)"]) from None
    if etag and not strong and now != etag:
        raise SourceChanged([f"{url}/{name} (another object than the one that was opened)"])
    if len(data) != end - start:
        raise SourceChanged([f"{url}/{name} ({len(data):,} bytes from {start:,}, not {end - start:,})"])
    return data


def listed(url: str) -> list[Object]:
    """The objects below a URL of a store, without what lies deeper, and without one that stands for the folder."""
    import obstore

    found = _again(lambda: obstore.list_with_delimiter(_store(url)), url)["objects"]
    return [each for each in map(_object, found) if each.name]


def head(url: str, name: str) -> Object | None:
    """An object, as its server describes it; None where there is none."""
    import obstore

    try:
        return _object(_again(lambda: obstore.head(_store(url), name), f"{url}/{name}"))
    except FileNotFoundError:
        return None


def _object(meta: Any) -> Object:
    return Object(meta["path"].rpartition("/")[2], int(meta["size"]), meta["last_modified"].timestamp(), meta.get("e_tag") or "")


def _again(work: Callable[[], T], what: str) -> T:
    """The result of a request, which is made again, after longer and longer waits, where that may help."""
    from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, PreconditionError, UnauthenticatedError

    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (NotFoundError, FileNotFoundError):  # the second, of Python's, where obstore gives a server's answer as it is
            raise FileNotFoundError(2, "no such object", what) from None
        except PreconditionError:
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise PermissionError(13, f"no permission to read it ({said(error)})", what) from None
        except BaseError as error:
            if attempt + 1 == ATTEMPTS:
                raise OSError(5, f"{said(error)}, {ATTEMPTS} times", what) from None
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError


@lru_cache(64)
def _store(url: str) -> Any:
    """The store at a URL, once a process; it makes requests again itself where a server is busy (5xx) or gone for a moment."""
    from obstore.store import HTTPStore

    retries: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=120)}
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return open_store(url, retry_config=retries)
    options: Any = {"timeout": "120s", "connect_timeout": "20s"}
    if parts.scheme == "http":
        options["allow_http"] = True
    if token := _hub_token(url):
        options["default_headers"] = {"Authorization": f"Bearer {token}"}
    return HTTPStore.from_url(url, client_options=options, retry_config=retries)


def _hub_token(url: str) -> str:
    """The token of the Hub, for its own address alone."""
    from huggingface_hub import constants, get_token

    return (get_token() or "") if url.startswith(f"{constants.ENDPOINT}/") else ""
