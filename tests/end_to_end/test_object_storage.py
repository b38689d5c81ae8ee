"""Outputs in object storage: killed they go on, larger than memory they fit, on clusters and in batches they are made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from benchmarks.models import make
from pipeline import BadInput, convert, plan, verify
from tests.end_to_end.test_memory import peak
from tests.support import checkpoints
from tests.support.commands import COMMAND, headrace
from tests.support.directories import contents
from tests.support.places import ROOT
from tests.support.range_server import range_server
from tests.support.s3_server import Proxied, empty, objects, open_uploads, s3_server, upload

OUT = "s3://bucket/out"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxied]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    with s3_server() as found:
        yield found
        found.fault = lambda *_: None
        empty()


@pytest.mark.nightly
@pytest.mark.parametrize("cut", ["auto", "shard"])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path, server: Proxied, cut: str) -> None:
    """Five parts of 16 MiB; at the fourth the process is killed, when the journal has had time for those before."""
    checkpoints.write(
        tmp_path / "model", {**checkpoints.LLAMA, "vocab_size": 20_000, "hidden_size": 1024, "torch_dtype": "bfloat16"}
    )
    options = ["--model_dir", str(tmp_path / "model"), "--output_dir", OUT, "--scheduler", "threads", "--workers", "1", "--quiet"]
    options += ["--scratch_after", cut]
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
@pytest.mark.parametrize(
    "options",
    [
        {"tp_size": 2},
        {"tp_size": 2, "dtype": "float16"},
        {"tp_size": 2, "scratch_after": "shard"},
        {"url": True},
    ],
    ids=str,
)
def test_a_model_larger_than_the_limit(tmp_path: Path, server: Proxied, options: dict[str, Any]) -> None:
    """2 GB, of which each worker has a part and some pieces; behind a URL, pieces that are fetched ahead too."""
    make(tmp_path / "big", "8B", layers=1, sparse=True, vocab_size=64_000)
    limit = 300 << 20
    options = {"scheduler": "threads", "workers": 2, "memory_limit": limit, "output_dir": OUT, **options}
    with range_server(tmp_path / "big") as served:
        source = served.url if options.pop("url", False) else str(tmp_path / "big")
        measured = peak(model_dir=source, **options)
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]
    assert bool(measured["scratch"]) == ("scratch_after" in options)
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


def test_workers_without_a_file_system_in_common_leave_rank_files_to_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch is all that they have in common: here a store of fsspec's that is in files. A worker that wrote a rank would fail."""
    from distributed import Client, LocalCluster

    monkeypatch.setenv("FSSPEC_LOCAL", '{"auto_mkdir": true}')  # as buckets have no directories
    monkeypatch.setitem(fsspec.config.conf, "local", {"auto_mkdir": True})

    def writes_no_rank() -> None:
        import stages.write

        def fail(*_: object) -> None:
            raise OSError(30, "a rank file, of a worker")

        stages.write._write_all = fail

    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "hidden_size": 64})
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "quantization": "none"}
    place = f"local://{tmp_path}/bucket"
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        client.run(writes_no_rank)
        options |= {"scheduler": cluster.scheduler_address, "scratch": place, "scratch_after": "shard"}
        made = plan(output_dir=tmp_path / "far", **options)
        assert any("written by this process" in note for note in made.notes)
        convert(output_dir=tmp_path / "far", **options)
        with pytest.raises(BadInput, match="rank files that this process assembles"):
            plan(output_dir=tmp_path / "far", engine={}, **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "near", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    assert list((tmp_path / "bucket").rglob("c")) == [], "scratch is removed after success"
