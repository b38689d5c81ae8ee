"""What every worker elsewhere must be and see, on real workers, in a mount namespace of their own where it matters."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.errors import BadInput
from pipeline.run import workers
from tests.support import checkpoints
from tests.support.directories import contents

Start = Callable[[str], str]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Start]:
    """Starts a scheduler with one worker, which first runs the shell commands that are given; gives its address."""
    from distributed import Client

    with ExitStack() as stack:

        def start(before: str = "true") -> str:
            file = tmp_path / "scheduler.json"
            python = shlex.quote(sys.executable)
            words = f"--host 127.0.0.1 --port 0 --no-dashboard --scheduler-file {file}"
            worker = f"--scheduler-file {file} --no-nanny --no-dashboard --local-directory {tmp_path / 'dask'}"
            user = ["--map-root-user"] if os.geteuid() else []
            for shell in (
                ["sh", "-c", f"exec {python} -m distributed.cli.dask_scheduler {words}"],
                ["unshare", "--mount", *user, "sh", "-c", f"{before} && exec {python} -m distributed.cli.dask_worker {worker}"],
            ):
                process = subprocess.Popen(shell, stderr=subprocess.DEVNULL)
                stack.callback(lambda process=process: (process.kill(), process.wait()))
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(1, timeout=30)
                return str(client.scheduler.address)

        yield start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


def test_a_worker_that_sees_all_of_it_converts_and_no_probe_is_left(tmp_path: Path, model: Path, cluster: Start) -> None:
    convert(model_dir=model, output_dir=tmp_path / "out", tp_size=2, scheduler=cluster("true"))
    convert(model_dir=model, output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not list(tmp_path.rglob(f"{workers.PROBE}*"))


@pytest.mark.parametrize("hidden", ["model", "ranks"])
def test_what_a_worker_does_not_see_is_refused_before_anything_is_written(
    tmp_path: Path, model: Path, cluster: Start, hidden: str
) -> None:
    (tmp_path / "ranks").mkdir()
    address = cluster(f"mount -t tmpfs tmpfs {shlex.quote(str(tmp_path / hidden))}")
    with pytest.raises(BadInput, match="one file system that all workers see") as caught:
        convert(model_dir=model, output_dir=tmp_path / "ranks/out", scheduler=address)
    place = model / "model.safetensors" if hidden == "model" else tmp_path / "ranks"
    assert f"{place}: No such file or directory" in str(caught.value)
    assert list((tmp_path / "ranks").iterdir()) == []


class Client:
    """Answers for a worker."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def run(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"tcp://w:1": self.answer}


def test_another_version_and_no_headrace_are_named(tmp_path: Path) -> None:
    mine = workers.versions()
    said = {"host": "w", "name": "n", "versions": {**mine, "headrace": "0.0.9"}, "wrong": {}}
    with pytest.raises(BadInput) as caught:
        workers.check_workers(Client(said), [], [])
    assert f"headrace 0.0.9, dask {mine['dask']}" in str(caught.value)
    assert "Install the same versions" in str(caught.value)
    with pytest.raises(BadInput, match="no answer \\(ModuleNotFoundError: No module named 'pipeline'\\)"):
        workers.check_workers(Client(ModuleNotFoundError("No module named 'pipeline'")), [], [])
    # It says that it wrote an answer, and nobody here sees it.
    with pytest.raises(BadInput, match="a file that it wrote there is not seen here"):
        workers.check_workers(Client({**said, "versions": mine}), [], [tmp_path / "out"])
