"""The note of who is at work on an output in object storage, at stores that know conditions and at those that do not."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.errors import BadInput
from pipeline.sinks import bucket_hold
from pipeline.sinks.bucket_output import BucketOutput
from pipeline.sinks.hold import Holder
from pipeline.sinks.output_checks import check_held
from pipeline.tensor import bucket
from pipeline.tensor.remote_path import as_path

DIRECTORY = as_path("s3://bucket/a")
OTHER = json.dumps(asdict(Holder("another-host", "boot", 1, "-"))).encode()


class Store:
    """A store of one object. `conditions`: whether it looks at them; "refused" for one that answers that it knows none."""

    def __init__(self, conditions: bool | str) -> None:
        self.conditions, self.data, self.version = conditions, b"", 0
        self.before: Callable[[], object] = lambda: None

    def read(self, url: str) -> tuple[bytes, str] | None:
        assert url == "s3://bucket/a/headrace.json.lock"
        return (self.data, str(self.version)) if self.data else None

    def put(self, url: str, data: bytes, only_if: str = "") -> None:
        self.before()
        if only_if and self.conditions == "refused":
            raise OSError(errno.ENOTSUP, "a request that it does not know (NotImplemented)", url)
        if self.conditions and only_if and only_if != (str(self.version) if self.data else "absent"):
            raise FileExistsError(errno.EEXIST, "another object", url)
        self.data, self.version = data, self.version + 1


@pytest.fixture(params=[True, False, "refused"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store(request.param)
    monkeypatch.setattr(bucket_hold, "read_object_at", made.read)
    monkeypatch.setattr(bucket_hold, "put_object", made.put)
    return made


def test_of_two_one_holds(store: Store) -> None:
    words = bucket_hold.take(DIRECTORY)
    assert store.data == words
    with pytest.raises(BadInput, match="another job at work on it"):
        bucket_hold.take(DIRECTORY)
    assert store.data == words


def test_a_note_of_another_host_stays(store: Store) -> None:
    store.data = OTHER
    with pytest.raises(BadInput, match="another job at work on it, process 1 on another-host"):
        bucket_hold.take(DIRECTORY)
    assert store.data == OTHER


def test_the_note_of_a_process_that_is_gone_is_passed_over(store: Store) -> None:
    me = Holder.me()
    store.data = json.dumps(asdict(Holder(me.host, "an earlier boot", 1, "-"))).encode()
    assert bucket_hold.take(DIRECTORY) == store.data


def test_another_job_that_was_quicker_holds(store: Store) -> None:
    """It writes its note between this one's look and its own."""

    def quicker() -> None:
        if store.conditions is True:
            store.data, store.version = OTHER, store.version + 1

    store.before = quicker
    if store.conditions is True:
        with pytest.raises(BadInput, match="process 1 on another-host"):
            bucket_hold.take(DIRECTORY)
        assert store.data == OTHER
    else:
        # Where conditions are not looked at, the note that is there last counts.
        put = store.put

        def overwritten(url: str, data: bytes, only_if: str = "") -> None:
            put(url, data, only_if)
            store.data = OTHER

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bucket_hold, "put_object", overwritten)
            with pytest.raises(BadInput, match="process 1 on another-host"):
                bucket_hold.take(DIRECTORY)


def test_an_answer_that_is_lost_costs_nothing(store: Store) -> None:
    """The request is made again, and finds its own note."""
    put = store.put

    def twice(url: str, data: bytes, only_if: str = "") -> None:
        put(url, data, only_if)
        put(url, data, only_if)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket_hold, "put_object", twice)
        assert bucket_hold.take(DIRECTORY) == store.data


def test_a_store_that_tells_objects_apart_by_a_version_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Google's: obstore refuses the ETag alone."""
    asked: list[tuple[str, object]] = []

    class Got:
        meta = {"e_tag": '"e"', "version": "7", "path": "a"}  # noqa: RUF012 (as a library gives it)

        def bytes(self) -> bytes:
            return b"words"

    def ask(_url: str, call: str, *_rest: object, **named: object) -> object:
        asked.append((call, named.get("mode")))
        return Got() if call == "get" else {"e_tag": '"f"', "version": "8"}

    monkeypatch.setattr(bucket, "ask_obstore", ask)
    found = bucket.read_object_at("gs://bucket/a")
    assert found
    assert found[0] == b"words"
    bucket.put_object("gs://bucket/a", b"mine", found[1])
    bucket.put_object("gs://bucket/a", b"mine", "absent")
    bucket.put_object("gs://bucket/a", b"mine")
    assert asked[1:] == [("put", {"e_tag": '"e"', "version": "7"}), ("put", "create"), ("put", "overwrite")]


def test_a_plan_sees_who_is_at_work(tmp_path: Path, store: Store) -> None:
    output = BucketOutput(DIRECTORY, (), "", "id", journals=tmp_path)
    assert check_held([output]) == []
    store.data = OTHER
    (problem,) = check_held([output])
    assert "process 1 on another-host" in problem.found
