"""Outputs in object storage: killed in the middle they go on, larger than memory they fit, in a batch they are units as others are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.models import make
from pipeline import convert, verify
from tests.end_to_end.test_memory import peak
from tests.support import checkpoints
from tests.support.commands import COMMAND, headrace
from tests.support.directories import contents
from tests.support.places import ROOT
from tests.support.s3_server import Proxied, objects, open_uploads, s3_server, upload

OUT = "s3://bucket/out"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxied]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    with s3_server() as found:
        yield found


@pytest.mark.nightly
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path, server: Proxied) -> None:
    """Five parts of 16 MiB; at the fourth the process is killed, when the journal has had time for those before."""
    checkpoints.write(
        tmp_path / "model", {**checkpoints.LLAMA, "vocab_size": 20_000, "hidden_size": 1024, "torch_dtype": "bfloat16"}
    )
    options = ["--model_dir", str(tmp_path / "model"), "--output_dir", OUT, "--scheduler", "threads", "--workers", "1", "--quiet"]
    process = subprocess.Popen([*COMMAND, "convert", *options])
    killed = threading.Event()

    def fault(_method: str, _path: str) -> str | None:
        if len(server.uploads()) < 4:
            return None
        if not killed.is_set():
            time.sleep(2.5)
            os.kill(process.pid, signal.SIGKILL)
            killed.set()
        return "cut"

    server.fault = fault
    assert process.wait() == -signal.SIGKILL
    server.fault = lambda *_: None
    before = server.uploads()[:3]
    assert set(objects(OUT)) == {"headrace.json.lock"}
    server.requests.clear()
    subprocess.run([*COMMAND, "convert", *options], check=True)
    assert not set(before) & set(server.uploads()), "what the store has is not sent again"
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "near", scheduler="threads")
    found = objects(OUT)
    assert {name: data for name, data in found.items() if name != "headrace.json"} == contents(tmp_path / "near")
    assert open_uploads() == []
    assert verify(OUT, tmp_path / "model").ok


@pytest.mark.nightly
def test_a_model_larger_than_the_limit(tmp_path: Path, server: Proxied) -> None:
    make(tmp_path / "big", "8B", layers=1, sparse=True, vocab_size=64_000)
    limit = 300 << 20
    measured = peak(model_dir=str(tmp_path / "big"), output_dir=OUT, tp_size=2, scheduler="threads", workers=2, memory_limit=limit)
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]
    assert len(server.uploads()) > 50


@pytest.mark.nightly
def test_a_batch_from_a_bucket_into_a_bucket(tmp_path: Path, server: Proxied) -> None:
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "hidden_size": 64})
    source = upload(tmp_path / "model", "s3://bucket/model")
    targets = "".join(f'[[job]]\noutput_dir = "s3://bucket/ranks/tp{n}"\ntp_size = {n}\n' for n in (1, 2))
    (tmp_path / "batch.toml").write_text(f'[defaults]\nmodel_dir = "{source}"\n{targets}')
    ran = headrace("batch", tmp_path / "batch.toml")
    assert ran.code == 0, ran.err
    for n in (1, 2):
        assert json.loads(objects(f"s3://bucket/ranks/tp{n}")["config.json"])["mapping"]["tp_size"] == n
    server.requests.clear()
    assert headrace("batch", tmp_path / "batch.toml").code == 0
    assert server.uploads() == []


@pytest.mark.nightly
def test_on_workers_that_are_processes(tmp_path: Path, server: Proxied) -> None:
    """They upload parts themselves, and see the directory of scratch; the output is on no file system."""
    from distributed import LocalCluster

    checkpoints.write(
        tmp_path / "model", {**checkpoints.LLAMA, "vocab_size": 20_000, "hidden_size": 512, "torch_dtype": "bfloat16"}
    )
    options = {"model_dir": tmp_path / "model", "tp_size": 2}
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        convert(output_dir=OUT, scheduler=cluster.scheduler_address, **options)
        assert convert(output_dir=OUT, scheduler=cluster.scheduler_address, **options).up_to_date
    convert(output_dir=tmp_path / "near", scheduler="local", **options)
    found = objects(OUT)
    assert {name: data for name, data in found.items() if name != "headrace.json"} == contents(tmp_path / "near")
    convert(output_dir="s3://bucket/again", scheduler="local", **options)
    assert {name: data for name, data in objects("s3://bucket/again").items() if name != "headrace.json"} == contents(
        tmp_path / "near"
    )
    assert len(server.uploads()) >= 8
    assert open_uploads() == []
