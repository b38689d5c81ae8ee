"""Conversions that calibrate and whose outputs are elsewhere: in a bucket, or where workers do not see them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert, plan
from tests.pipeline.calibration.test_one_graph import expected as expected
from tests.pipeline.calibration.test_one_graph import made as made
from tests.pipeline.calibration.test_one_graph import ranks
from tests.pipeline.run.test_workers import Start
from tests.pipeline.run.test_workers import cluster as cluster
from tests.support.s3_server import empty, objects, open_uploads, s3_server

OUT = "s3://bucket/a/far"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server with an empty bucket, and an empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with s3_server():
        yield
        empty()


@pytest.mark.parametrize("scratch", ["", "memory://{}", "{}/scratch"])
@pytest.mark.usefixtures("server")
def test_a_bucket_gets_the_bytes_of_a_directory(
    scratch: str, made: dict[str, Any], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The activations are in a directory all the same."""
    place = scratch.format(tmp_path.name if "://" in scratch else tmp_path)
    options = {**made, "output_dir": OUT, "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}
    options |= {"scratch": place} if scratch else {}
    local = tmp_path / ("scratch" if scratch and "://" not in scratch else "here/.headrace-scratch")
    assert Path(plan(**options).summary()["calibration"]["scratch"]).parent == local
    convert(**options)
    assert {name: data for name, data in objects(OUT).items() if name != "headrace.json"} == expected
    assert open_uploads() == []
    assert list((tmp_path / "here").iterdir()) == []
    assert not list(local.glob("*"))


def test_workers_that_see_scratch_alone_calibrate(
    made: dict[str, Any], expected: dict[str, bytes], tmp_path: Path, cluster: Start
) -> None:
    (tmp_path / "ranks").mkdir()
    address = cluster(f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / 'ranks'))}")
    options = {**made, "output_dir": tmp_path / "ranks/out", "scratch": tmp_path / "shared", "scheduler": address}
    convert(**options, calibration_tokens=tmp_path / "tokens")
    assert ranks(tmp_path / "ranks/out") == expected
    assert not list((tmp_path / "shared").glob("*"))
