"""A daemon that watches a directory and writes what it makes into a bucket."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.pipeline.jobs.daemon import Place
from tests.pipeline.jobs.stand_in import wait
from tests.support import checkpoints
from tests.support.places import ROOT
from tests.support.s3_server import objects, s3_server


@pytest.mark.nightly
def test_what_arrives_goes_into_a_bucket_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    (tmp_path / "in").mkdir()
    text = """
    [[watch]]
    name = "arrivals"
    path = "in"
    every_seconds = 0.2
    settle_seconds = 0.5
    [watch.job]
    output_dir = "s3://bucket/ranks/{model}"
    """
    place.write("schedule.toml", text)
    with s3_server() as server:
        with place.serving():
            checkpoints.write(tmp_path / "in/new", checkpoints.LLAMA)
            wait(lambda: place.states() == ["done"])
        (run,) = place.runs()
        assert run["outputs"] == ["s3://bucket/ranks/new"]
        assert json.loads(objects("s3://bucket/ranks/new")["config.json"])["mapping"]["world_size"] == 1
        server.requests.clear()
        with place.serving():
            time.sleep(1.2)
        assert (len(place.runs()), server.uploads()) == (1, []), "also the next daemon knows it"
