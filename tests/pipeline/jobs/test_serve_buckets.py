"""A daemon that watches a prefix of a bucket, and writes what it makes into another."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.pipeline.jobs.test_serve import Place, wait
from tests.support.places import ROOT
from tests.support.s3_server import objects, s3_server, upload


@pytest.mark.nightly
def test_what_arrives_in_a_bucket_goes_into_a_bucket_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    text = """
    [[watch]]
    name = "arrivals"
    path = "s3://bucket/in"
    every_seconds = 0.2
    settle_seconds = 0.5
    [watch.job]
    output_dir = "s3://bucket/ranks/{model}-{fingerprint}"
    """
    place.write("schedule.toml", text)
    with s3_server() as server:
        with place.serving():
            upload(tmp_path / "model", "s3://bucket/in/new")
            wait(lambda: place.states() == ["done"])
        (run,) = place.runs()
        (output,) = run["outputs"]
        assert output.startswith("s3://bucket/ranks/new-")
        assert json.loads(objects(output)["config.json"])["mapping"]["world_size"] == 1
        server.requests.clear()
        with place.serving():
            time.sleep(1.2)
        assert (len(place.runs()), server.uploads()) == (1, []), "also the next daemon knows it"
