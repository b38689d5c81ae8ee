"""Requests to object storage, made again where that may help: S3's through botocore, others through obstore.

Credentials are those of each provider's own chain (the environment, its configuration, the machine's role), and stand in no text.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

ATTEMPTS, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 9, 0.5, 30.0
CONNECTIONS = 64

_GONE = {"NoSuchKey", "NoSuchUpload", "NotFound", "404"}
_LATER = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict"}
_FULL = re.compile("quotaexceeded|storagefull|insufficientstorage|507 ", re.IGNORECASE)
_ONE_AT_A_TIME = threading.Lock()  # botocore makes one client at a time

T = TypeVar("T")


def pages(url: str, call: str, asked: Mapping[str, Any], markers: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """The pages of a listing. `markers`: what a page says of the next, and how that is asked for."""
    more: dict[str, Any] = {}
    while True:
        page = ask_s3(url, call, **asked, **more)
        yield page
        if not page.get("IsTruncated"):
            return
        more = {ask: page[said] for said, ask in markers.items() if said in page}


@lru_cache(1)
def _client() -> Any:
    """The client of S3, once a process; what it takes from the environment is botocore's own affair."""
    import botocore.session
    from botocore.config import Config

    config = Config(
        connect_timeout=20,
        read_timeout=120,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},  # counted below
    )
    session = botocore.session.get_session()
    region = session.get_config_variable("region") or os.environ.get("AWS_REGION") or "us-east-1"
    return session.create_client("s3", region_name=region, config=config)


def ask_s3(url: str, call: str, *, read: bool = False, **asked: Any) -> Any:
    """Ask S3. `read`: with the body read whole. Raises OSError, naming the URL."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError

    with _ONE_AT_A_TIME:
        client = _client()

    def work() -> Any:
        said = getattr(client, call)(**asked)
        return {**said, "Body": said["Body"].read()} if read else said

    def judged(error: Exception) -> OSError | None:
        if isinstance(error, NoCredentialsError):
            return PermissionError(errno.EACCES, "no credentials of S3 in the environment or the provider's chain", url)
        if isinstance(error, HTTPClientError):
            return None
        if isinstance(error, BotoCoreError):
            return OSError(errno.EREMOTEIO, _without_addresses(error), url)
        assert isinstance(error, ClientError)
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _os_error(code, status, _without_addresses(error), url)

    return _again(work, (ClientError, BotoCoreError), judged, url)


def _os_error(code: str, status: int, text: str, url: str) -> OSError | None:
    """The error of an answer; None where the same request may be answered otherwise later."""
    if _FULL.search(code) or status == 507:
        return OSError(errno.ENOSPC, f"no room in the bucket ({code})", url)
    if code == "NoSuchBucket":
        return OSError(errno.ENOENT, "no such bucket", url)
    if code in _GONE:
        return FileNotFoundError(errno.ENOENT, "no such object or upload", url)
    if status >= 500 or status == 429 or code in _LATER:
        return None
    if status == 412:
        return FileExistsError(errno.EEXIST, "another object", url)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"no permission ({code})", url)
    return OSError(errno.EREMOTEIO, text, url)


def ask_obstore(url: str, call: str, *asked: Any, **named: Any) -> Any:
    """Ask a store through obstore. Raises OSError, naming the URL."""
    import obstore
    from obstore.exceptions import BaseError

    work = lambda: getattr(obstore, call)(whole_bucket(url), *asked, **named)  # noqa: E731
    return _again(work, (BaseError, FileNotFoundError), lambda error: _of_obstore(error, url), url)


@contextmanager
def naming_store(url: str) -> Iterator[None]:
    """Have errors of obstore be errors of the system, which name the URL."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise _of_obstore(error, url) or OSError(errno.EREMOTEIO, _without_addresses(error), url) from None


def _of_obstore(error: Exception, url: str) -> OSError | None:
    """The error of an answer; None where the same request may be answered otherwise later."""
    from obstore import exceptions as known

    if _FULL.search(str(error)):
        return OSError(errno.ENOSPC, "no room in the bucket", url)
    if isinstance(error, (known.NotFoundError, FileNotFoundError)):
        return FileNotFoundError(errno.ENOENT, "no such object", url)
    if isinstance(error, (known.AlreadyExistsError, known.PreconditionError)):
        return FileExistsError(errno.EEXIST, "another object", url)
    if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError)):
        return PermissionError(errno.EACCES, "no permission", url)
    return None


def whole_bucket(url: str) -> Any:
    """The store of obstore of a whole bucket."""
    parts = urlsplit(url)
    return _store_of(f"{parts.scheme}://{parts.netloc}")


@lru_cache(16)
def _store_of(bucket: str) -> Any:
    from obstore.store import from_url

    options: Any = {"timeout": "120s", "connect_timeout": "20s"}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = True
    return from_url(bucket, client_options=options)


def _again(work: Callable[[], T], caught: tuple[type[Exception], ...], judged: Callable[[Any], OSError | None], url: str) -> T:
    """The result of a request, which is made again after longer and longer waits. `judged`: an error that is final, or None."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except caught as error:
            final = judged(error)
            if final is not None:
                raise final from None
            if attempt + 1 == ATTEMPTS:
                raise OSError(errno.EREMOTEIO, f"{_without_addresses(error)}, {ATTEMPTS} times", url) from None
            time.sleep(min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS))
    raise AssertionError


def _without_addresses(error: Exception) -> str:
    """The first line of an error without addresses, which may be signed, and without keys."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"https?://\S+", "...", text)[:300]
