"""Conversion and building on a cluster: engines are built by the worker that has a GPU, and wait for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import LocalCluster

from pipeline.run.schedulers import runner
from tests import stand_ins
from tests.support import checkpoints
from tests.support.builds import alive, names, provenance
from tests.support.commands import COMMAND


@pytest.fixture
def cluster() -> Iterator[str]:
    """A scheduler with one worker that has no GPU."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as running:
        yield running.scheduler_address


@contextlib.contextmanager
def gpu_worker(scheduler: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with the resource GPU and, alone of all, with TensorRT-LLM."""
    stand_ins.install(folder / "bin")
    where = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", **environment}
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
    with subprocess.Popen([*command, "--resources", "GPU=1"], env=where, stderr=subprocess.DEVNULL) as worker:
        try:
            yield worker
        finally:
            worker.terminate()


def wait_for_gpu(scheduler: str) -> None:
    with runner(scheduler, 1) as session:
        while not session.offers({"GPU": 1}):
            time.sleep(0.05)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(running: subprocess.Popen[str], part: str) -> list[str]:
    """The lines of standard error up to one that holds `part`."""
    assert running.stderr
    lines: list[str] = []
    while not lines or part not in lines[-1]:
        lines.append(running.stderr.readline())
        assert lines[-1], lines
    return lines


def test_a_job_converts_at_once_and_builds_when_a_gpu_comes(cluster: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    text = "[engine]\nmax_batch_size = 8\n[[target]]\noutput_dir = 'one'\n[[target]]\noutput_dir = 'two'\ntp_size = 2\n"
    (tmp_path / "job.toml").write_text(f"model_dir = 'model'\nscheduler = '{cluster}'\n{text}")
    running = start("convert", tmp_path / "job.toml")
    wait_for_line(running, "waiting for a Dask worker with the resource GPU")
    # The checkpoints are whole; there is no engine, and nothing of one.
    assert all((tmp_path / name / "config.json").exists() for name in ("one", "two"))
    assert not [name for name in names(tmp_path) if "engine" in name]
    with gpu_worker(cluster, tmp_path):
        out, errors = running.communicate()
    assert running.returncode == 0, errors
    assert f"{tmp_path}/two-engine: " in out
    assert "Build TensorRT engine Unnamed Network 1" in errors  # the builder's lines come from where it runs
    # Only that worker had a builder.
    assert provenance(tmp_path / "two-engine")["command"][0] == str(tmp_path / "bin" / "trtllm-build")


def test_the_builder_of_the_gpu_s_machine_is_asked_before_the_conversion(cluster: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    options = "output_dir = 'ranks'\n[engine]\nlora_target_modules = ['attn_qq']\n"
    (tmp_path / "job.toml").write_text(f"model_dir = 'model'\nscheduler = '{cluster}'\n{options}")
    with gpu_worker(cluster, tmp_path):
        wait_for_gpu(cluster)
        running = start("convert", tmp_path / "job.toml")
        _, errors = running.communicate()
    assert running.returncode == 2
    assert "engine.lora_target_modules: found attn_qq; expected one of attn_qkv, attn_q, mlp_gate" in errors
    assert "ranks" not in names(tmp_path)


def test_ranks_are_tasks_of_the_gpu_s_worker(cluster: str, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with gpu_worker(cluster, tmp_path / "machine", PYTHONPATH=stand_ins.python_path(), STAND_IN_RECORD=str(record)):
        wait_for_gpu(cluster)
        running = start("build", checkpoint, "--output_dir", engine, "--scheduler", cluster, "--builder", "python")
        _, errors = running.communicate()
    assert running.returncode == 0, errors
    assert sorted(json.loads(line)["rank"] for line in record.read_text().splitlines()) == [0, 1]


def test_ctrl_c_ends_the_builder_on_the_other_machine(cluster: str, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with gpu_worker(cluster, tmp_path / "machine", STAND_IN_TROUBLE="hang", STAND_IN_STATE=str(state)):
        running = start("build", checkpoint, "--output_dir", engine, "--scheduler", cluster)
        while not state.exists() or not state.read_text():
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate()
        assert running.returncode == 3, errors
        assert f"interrupted; nothing is left of {engine}" in errors
        pids = json.loads(state.read_text())
        while any(map(alive, pids)):
            time.sleep(0.02)
    assert names(engine.parent) == {"ranks", "machine", "state", "engine.log"}


def test_ctrl_c_while_it_waits(cluster: str, checkpoint: Path, engine: Path) -> None:
    running = start("build", checkpoint, "--output_dir", engine, "--scheduler", cluster)
    wait_for_line(running, "waiting for a Dask worker")
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 3, errors
    assert "Traceback" not in errors
    assert names(engine.parent) == {"ranks"}


def test_what_a_worker_that_died_was_building_is_built_by_another(
    cluster: str, checkpoint: Path, engine: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    environment = {"STAND_IN_TROUBLE": "hang", "STAND_IN_STATE": str(state)}
    with gpu_worker(cluster, tmp_path / "machine", **environment) as worker:
        running = start("build", checkpoint, "--output_dir", engine, "--scheduler", cluster)
        while not state.exists() or not state.read_text():
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        worker.kill()
        worker.wait()
        while any(map(alive, json.loads(state.read_text()))):  # its builder ends with it
            time.sleep(0.02)
    # The task waits for another one with a GPU.
    with gpu_worker(cluster, tmp_path / "machine"):
        _, errors = running.communicate()
    assert running.returncode == 0, errors
    assert (engine / "rank1.engine").exists()
