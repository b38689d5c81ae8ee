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
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

ATTEMPTS, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 9, 0.5, 30.0
CONNECTIONS = 64

_GONE = {"NoSuchKey", "NoSuchUpload", "NotFound", "404"}
_LATER = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict"}
_FULL = re.compile("quotaexceeded|storagefull|insufficientstorage|507 ", re.IGNORECASE)
_STATUS = re.compile(r"status code: \d{3}[ \w]*")  # behind which obstore has the server's answer
_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")  # of S3, in such an answer
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
        more = {ask: page[key] for key, ask in markers.items() if key in page}


@lru_cache(1)
def _session() -> Any:
    import botocore.session

    return botocore.session.get_session()


@lru_cache(1)
def _client() -> Any:
    """The client of S3, once a process; what it takes from the environment is botocore's own affair."""
    from botocore.config import Config

    config = Config(
        connect_timeout=20,
        read_timeout=120,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},  # counted below
    )
    session = _session()
    region = session.get_config_variable("region") or os.environ.get("AWS_REGION") or "us-east-1"
    return session.create_client("s3", region_name=region, config=config)


def ask_s3(url: str, call: str, *, read: bool = False, **asked: Any) -> Any:
    """Ask S3. `read`: with the body read whole. Raises OSError, naming the URL."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    def work() -> Any:
        with _ONE_AT_A_TIME:
            client = _client()
        answer = getattr(client, call)(**asked)
        return {**answer, "Body": answer["Body"].read()} if read else answer

    def judged(error: Exception) -> OSError | None:
        if isinstance(error, NoCredentialsError):
            return PermissionError(errno.EACCES, "no credentials of S3 in the environment or the provider's chain", url)
        if isinstance(error, _passing()) and "certificate" not in str(error).lower():
            return None
        if isinstance(error, (BotoCoreError, ValueError)):  # of the library's configuration, or of the request
            return OSError(errno.EREMOTEIO, said(error), url)
        assert isinstance(error, ClientError)
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return _os_error(code, status, said(error), url)

    return _again(work, (ClientError, BotoCoreError, ValueError), judged, url)


def _passing() -> tuple[type[Exception], ...]:
    """The errors of connections that may be better later: refused, timed out, or broken off."""
    from botocore.exceptions import ConnectionError, HTTPClientError, IncompleteReadError

    return HTTPClientError, ConnectionError, IncompleteReadError


def _os_error(code: str, status: int, text: str, url: str) -> OSError | None:
    """The error of an answer; None where the same request may be answered otherwise later."""
    if _FULL.search(code) or status == 507:
        return OSError(errno.ENOSPC, f"no room in the bucket ({code})", url)
    if code == "NoSuchBucket":
        return OSError(errno.ENOENT, "no such bucket", url)
    if code in _GONE:
        return FileNotFoundError(errno.ENOENT, "no such object or upload", url)
    if status == 501:
        return OSError(errno.ENOTSUP, f"a request that it does not know ({code})", url)
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


def all_below(url: str, prefix: str) -> list[Any]:
    """The objects below a prefix, however deep, as obstore describes them. Raises OSError, naming the URL."""
    import obstore
    from obstore.exceptions import BaseError

    work = lambda: list(obstore.list(whole_bucket(url), prefix).collect())  # noqa: E731
    return _again(work, (BaseError, FileNotFoundError), lambda error: _of_obstore(error, url), url)


@contextmanager
def naming_store(url: str) -> Iterator[None]:
    """Have errors of obstore be errors of the system, which name the URL."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise _of_obstore(error, url) or OSError(errno.EREMOTEIO, said(error), url) from None


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
    return open_store(bucket)


def open_store(url: str, **more: Any) -> Any:
    """The store of obstore at a URL of a provider's, with more options of the library.

    S3's has the credentials, the region and the address that botocore finds, where that is installed: obstore itself knows the
    environment and the machine's role, and no configuration. The path is taken as it is, without its % being read.
    """
    from obstore.store import from_url

    parts = urlsplit(url)
    options: Any = {"timeout": "120s", "connect_timeout": "20s"}
    named: dict[str, Any] = {}
    address = _base_url(os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY", "")) if parts.scheme == "gs" else ""
    if parts.scheme == "s3":
        named, address = _by_botocore()
    if address.startswith("http://"):
        options["allow_http"] = True
    return from_url(f"{parts.scheme}://{parts.netloc}{quote(parts.path)}", client_options=options, **named, **more)


def _by_botocore() -> tuple[dict[str, Any], str]:
    """Options of obstore's store of S3 as botocore has them, and the server's address, "" for Amazon's."""
    address = os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        with _ONE_AT_A_TIME:
            client = _client()
    except Exception:  # it is not installed, or its configuration is wrong: obstore says what it lacks
        return {}, address
    found: dict[str, Any] = {"region": client.meta.region_name}
    if not client.meta.endpoint_url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        found["endpoint"] = address = client.meta.endpoint_url
    if credentials := _session().get_credentials():
        found["credential_provider"] = partial(_fresh, credentials)
    return found, address


def _fresh(credentials: Any) -> dict[str, Any]:
    """Credentials of botocore, renewed where they end soon, as obstore takes them: it asks again after some minutes."""
    known = credentials.get_frozen_credentials()
    ends = datetime.now(UTC) + timedelta(minutes=10)
    return {"access_key_id": known.access_key, "secret_access_key": known.secret_key, "token": known.token, "expires_at": ends}


def _base_url(key: str) -> str:
    """The address of a server that stands in for Google's, which obstore takes from the JSON of a service account's key."""
    found = re.search(r'"gcs_base_url"\s*:\s*"([^"]+)"', key)
    return found[1] if found else ""


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
                raise OSError(errno.EREMOTEIO, f"{said(error)}, {ATTEMPTS} times", url) from None
            time.sleep(min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS))
    raise AssertionError


def said(error: Exception) -> str:
    """An error in one line, without addresses, which may be signed, and without what the server answered but for its code.

    Servers repeat requests in their answers, and a request has the name of a key and a signature in it.
    """
    first, *more = str(error).splitlines() or [type(error).__name__]
    if first.endswith(":") and more:  # botocore's of a request that it does not make, such as of an invalid name
        first = f"{first} {more[0].strip()}"
    code = _CODE.search(str(error))
    if status := _STATUS.search(first):
        first = first[: status.end()] + (f" ({code[1]})" if code else "")
    return re.sub(r"\w+://\S+", "...", first)[:300]
