"""Outputs in object storage, against an S3 server on this machine: the bytes of a directory, in parts that outlive a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.planning.rank_parts
import pipeline.tensor.store_requests
from pipeline import convert, plan, verify
from tests.support import checkpoints
from tests.support.directories import contents
from tests.support.s3_server import Proxied, objects, open_uploads, s3_server

BIG = {**checkpoints.LLAMA, "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 384, "torch_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def server() -> Iterator[Proxied]:
    with s3_server() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline.tensor.store_requests, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(pipeline.planning.rank_parts, "PART_BYTES", 100_000)
    monkeypatch.chdir(tmp_path)


def without_times(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name != "headrace.json"}


def model(tmp_path: Path, config: dict[str, Any] = BIG) -> Path:
    place = tmp_path / "model"
    checkpoints.write(place, config)
    return place


def test_a_bucket_gets_the_bytes_of_a_directory_in_parts(tmp_path: Path, server: Proxied) -> None:
    options = {"model_dir": model(tmp_path), "tp_size": 2, "use_parallel_embedding": True, "scheduler": "threads"}
    convert(output_dir=tmp_path / "near", **options)
    before = len(server.uploads())
    convert(output_dir="s3://bucket/a/far", **options)
    assert without_times(objects("s3://bucket/a/far")) == contents(tmp_path / "near")
    assert len(server.uploads()) - before > 10
    assert open_uploads() == []
    assert verify("s3://bucket/a/far", tmp_path / "model").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model", "near"], "scratch and journal are gone"
    assert plan(output_dir="s3://bucket/a/far", **options).up_to_date
    assert convert(output_dir="s3://bucket/a/far", **options).up_to_date
