"""Requests to object storage: which are made again, what ends them, and with whose credentials."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.tensor import bucket, store_requests
from stages.read.object_store import listed
from tests.support.s3_server import Proxied, client, forget_clients, s3_server

exceptions = pytest.importorskip("botocore.exceptions")
URL = "s3://bucket/a"


@pytest.fixture(scope="module")
def server() -> Iterator[Proxied]:
    with s3_server() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_requests, "FIRST_PAUSE_SECONDS", 0.001)


class Failing:
    """A client whose requests fail at first with `errors`."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors, self.asked = errors, 0

    def head_object(self, **_: Any) -> dict[str, int]:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return {"ContentLength": 7}


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> Failing:
    made = Failing([*errors])
    monkeypatch.setattr(store_requests, "_client", lambda: made)
    return made


AT = {"endpoint_url": "http://user:hidden@host"}
PASSING = [
    exceptions.EndpointConnectionError(**AT),
    exceptions.ConnectTimeoutError(**AT),
    exceptions.ConnectionClosedError(**AT),
    exceptions.ReadTimeoutError(**AT),
    exceptions.ProxyConnectionError(proxy_url="http://hidden"),
    exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
]


def test_a_connection_that_is_refused_or_breaks_off_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = failing(monkeypatch, *PASSING)
    assert bucket.object_size(URL) == 7
    assert made.asked == len(PASSING) + 1


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_at_last_it_is_said_without_addresses(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, *[error] * 99)
    with pytest.raises(OSError, match="9 times") as caught:
        bucket.object_size(URL)
    assert "hidden" not in str(caught.value)
    assert caught.value.filename == URL


@pytest.mark.parametrize(
    "error",
    [exceptions.ProfileNotFound(profile="nobody"), ValueError("Invalid endpoint: localhost:9000"),
     exceptions.SSLError(endpoint_url="https://host", error="certificate verify failed"),
     exceptions.ParamValidationError(report="Invalid bucket name 'A_b'")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_no_repetition_mends_ends_at_once_and_says_why(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    made = failing(monkeypatch, *[error] * 9)
    with pytest.raises(OSError, match=r"nobody|Invalid endpoint|certificate|Invalid bucket name"):
        bucket.object_size(URL)
    assert made.asked == 1


def test_a_configuration_that_botocore_refuses_is_no_traceback() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        forget_clients()
        with pytest.raises(OSError, match="nobody"):
            bucket.object_size(URL)
    forget_clients()


def test_a_request_that_a_store_does_not_know_is_not_repeated() -> None:
    found = store_requests._os_error("NotImplemented", 501, "", URL)
    assert found
    assert found.errno == errno.ENOTSUP


def test_obstore_has_the_credentials_and_the_address_of_botocore(server: Proxied, tmp_path: Path) -> None:
    """Which may stand in its configuration alone; and a % in a key is one."""
    client().put_object(Bucket="bucket", Key="a%20b/c/x.bin", Body=b"there")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = an-id\naws_secret_access_key = a-secret\n")
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {server.url}\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
            patch.delenv(name)
        for name in ("credentials", "config"):
            patch.setenv({"config": "AWS_CONFIG_FILE"}.get(name, "AWS_SHARED_CREDENTIALS_FILE"), str(tmp_path / name))
        patch.setenv("AWS_PROFILE", "mine")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        forget_clients()
        store: Any = store_requests.open_store("s3://bucket/a%20b")
        import obstore

        assert bytes(obstore.get(store, "c/x.bin").bytes()) == b"there"
        assert bucket.object_size("s3://bucket/a%20b/c/x.bin") == 5
    forget_clients()


@pytest.mark.parametrize("in_parts", [True, False], ids=["botocore", "obstore"])
@pytest.mark.usefixtures("server")
def test_objects_that_stand_for_folders_are_none(in_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, data in (("f/", b""), ("f/x", b"1"), ("f/sub/", b""), ("f/sub/y", b"22"), ("f2/z", b"")):
        client().put_object(Bucket="bucket", Key=key, Body=data)
    monkeypatch.setattr(bucket, "IN_PARTS", ("s3",) if in_parts else ())
    assert bucket.objects_below("s3://bucket/f") == {"x": 1}
    assert bucket.objects_below("s3://bucket/f", deep=True) == {"x": 1, "sub/y": 2}
    assert [each.name for each in listed("s3://bucket/f")] == ["x"]


def test_an_error_is_said_in_one_line_without_what_a_server_repeats() -> None:
    assert store_requests.said(exceptions.ParamValidationError(report="Invalid bucket name 'A_b'")) == (
        "Parameter validation failed: Invalid bucket name 'A_b'"
    )
    answer = "<Error><Code>AccessDenied</Code><StringToSign>AWS4 hidden</StringToSign></Error>"
    text = f"Server returned non-2xx status code: 403 Forbidden: {answer}\n\nDebug: {answer}"
    assert store_requests.said(OSError(text)) == "Server returned non-2xx status code: 403 Forbidden (AccessDenied)"
    assert store_requests.said(OSError("error sending request for http://host/a?X-Amz-Signature=hidden")).endswith("for ...")
    assert store_requests.said(OSError()) == "OSError"
