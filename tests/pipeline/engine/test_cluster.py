"""Conversion and building on a cluster: engines are built by the worker that has a GPU, and wait for it."""

from __future__ import annotations

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

from pipeline.engine import engines
from tests import stand_ins
from tests.support import checkpoints
from tests.support.builds import alive, gpu_worker, names, provenance, start, wait_for_gpu, wait_for_line
from tests.support.commands import headrace, tree


@pytest.fixture
def cluster() -> Iterator[str]:
    """A scheduler with one worker that has no GPU."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as running:
        yield running.scheduler_address


# As the command, but for how long it waits for a worker with a GPU when all is converted.
PATIENT = [
    sys.executable,
    "-P",
    "-c",
    "import pipeline.engine.engines as e; e.WAIT_SECONDS = 300; from pipeline.cli import main; main()",
]
JOB = "[engine]\nmax_batch_size = 8\n[[target]]\noutput_dir = 'one'\n[[target]]\noutput_dir = 'two'\ntp_size = 2\n"


def job(folder: Path, scheduler: str, text: str = JOB) -> Path:
    """A job's file, and its model beside it."""
    checkpoints.write(folder / "model", checkpoints.LLAMA)
    (folder / "job.toml").write_text(f"model_dir = 'model'\nscheduler = '{scheduler}'\n{text}")
    return folder / "job.toml"


def whole(folder: Path, *outputs: str) -> bool:
    """Whether these outputs are there, and no journal nor any other trace of the work on them."""
    held = [names(folder / name) for name in outputs]
    return all("config.json" in each and not any(name.endswith(".partial") for name in each) for each in held)


def test_a_job_converts_at_once_and_builds_when_a_gpu_comes(cluster: str, tmp_path: Path) -> None:
    running = start("convert", job(tmp_path, cluster), command=PATIENT)
    wait_for_line(running, "waiting for a Dask worker with the resource GPU")
    # The checkpoints are whole; there is no engine.
    assert whole(tmp_path, "one", "two")
    assert not {"one-engine", "two-engine"} & names(tmp_path)
    with gpu_worker(cluster, tmp_path):
        out, errors = running.communicate()
    assert running.returncode == 0, errors
    assert f"{tmp_path}/two-engine: " in out
    assert "Build TensorRT engine Unnamed Network 1" in errors  # the builder's lines come from where it runs
    # Only that worker had a builder, and was asked for its version.
    facts = provenance(tmp_path / "two-engine")
    assert (facts["command"][0], facts["inputs"]["version"]) == (str(tmp_path / "bin" / "trtllm-build"), "1.2.1")


def test_without_a_gpu_all_is_converted_and_that_is_said(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WAIT_SECONDS", 0.3)
    ran = headrace("convert", job(tmp_path, cluster))
    assert ran.code == 4, ran
    assert whole(tmp_path, "one", "two")
    for name in ("one", "two"):
        assert f"{tmp_path}/{name}-engine: found no worker with the resource GPU at {cluster}; expected one" in ran.err
    assert f"dask worker {cluster} --nthreads 1 --resources GPU=1" in ran.err
    assert names(tmp_path) == {"model", "job.toml", "one", "two"}
    # The same command does the builds alone, once there is one.
    before = tree(tmp_path / "one")
    with gpu_worker(cluster, tmp_path):
        wait_for_gpu(cluster)
        ran = headrace("convert", tmp_path / "job.toml")
    assert ran.code == 0, ran
    assert "is up to date: nothing to do" in ran.out
    assert {"rank0.engine", "rank1.engine"} < names(tmp_path / "two-engine")
    assert tree(tmp_path / "one") == before


LOCAL = "class = 'distributed.LocalCluster'\nn_workers = 1\nthreads_per_worker = 1\nprocesses = true\ndashboard_address = ':0'\n"


def test_of_a_cluster_that_the_job_names_a_worker_is_asked_for_the_builder(tmp_path: Path) -> None:
    """This process has none."""
    folder = stand_ins.install(tmp_path / "bin").parent
    worker = f"resources = {{ GPU = 1 }}\nenv = {{ PATH = '{folder}{os.pathsep}{os.environ['PATH']}' }}\n"
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    file = tmp_path / "job.toml"
    file.write_text(f"model_dir = 'model'\noutput_dir = 'ranks'\n[engine]\n[cluster]\n{LOCAL}{worker}")
    ran = headrace("convert", file)
    assert ran.code == 0, ran
    assert provenance(tmp_path / "ranks-engine")["inputs"]["version"] == "1.2.1"


def test_a_cluster_that_the_job_names_and_that_offers_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WAIT_SECONDS", 0.3)
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    (tmp_path / "job.toml").write_text(f"model_dir = 'model'\noutput_dir = 'ranks'\n[engine]\n[cluster]\n{LOCAL}")
    ran = headrace("convert", tmp_path / "job.toml")
    assert ran.code == 4, ran
    assert "waiting for a Dask worker with the resource GPU: one of the distributed.LocalCluster" in ran.err
    assert "found no worker with the resource GPU at distributed.LocalCluster; expected one" in ran.err
    assert "Have the [cluster] table start a worker with --resources GPU=1" in ran.err
    assert "dask worker" not in ran.err
    assert whole(tmp_path, "ranks")


def hold_once(folder: Path, real: Path) -> Path:
    """A folder with a trtllm-build that does nothing for long when it is called to build for the first time."""
    builder = folder / "held" / "trtllm-build"
    builder.parent.mkdir()
    held = f"mkdir {folder}/began 2> /dev/null && exec sleep 600"
    builder.write_text(f'#!/bin/sh\ncase "$*" in *--help*) ;; *) {held};; esac\nexec {real} "$@"\n')
    builder.chmod(0o755)
    return builder.parent


def wait_until_it_builds(running: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "began").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)


SCRATCH = "output_dir = 'ranks'\nscratch_after = ['rename']\n[engine]\n"


def test_the_only_worker_dies_while_it_builds(tmp_path: Path, on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the results of all that it has converted. Its nanny starts another, which does nothing of that again."""
    monkeypatch.setenv("PATH", str(hold_once(tmp_path, on_path / "trtllm-build")), prepend=os.pathsep)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, resources={"GPU": 1}) as alone:
        running = start("convert", job(tmp_path, alone.scheduler_address, SCRATCH))
        wait_until_it_builds(running, tmp_path)
        before = tree(tmp_path / "ranks")
        (worker,) = alone.workers.values()
        os.kill(worker.pid, signal.SIGKILL)
        _, errors = running.communicate()
    assert running.returncode == 0, errors
    assert {name: state for name, state in tree(tmp_path / "ranks").items() if name != "."} == {
        name: state for name, state in before.items() if name not in (".", "headrace.json.partial")
    }
    assert ".headrace-scratch" not in names(tmp_path)
    assert "rank0.engine" in names(tmp_path / "ranks-engine")


@pytest.mark.nightly  # it waits for the worker to come back
def test_a_build_that_takes_its_workers_with_it_ends_no_conversion(tmp_path: Path, on_path: Path) -> None:
    held = hold_once(tmp_path, on_path / "trtllm-build")
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as running_cluster:
        running_cluster.scheduler.allowed_failures = 0
        address = running_cluster.scheduler_address
        with gpu_worker(address, tmp_path, PATH=f"{held}{os.pathsep}{os.environ['PATH']}") as worker:
            wait_for_gpu(address)
            running = start("convert", job(tmp_path, address, SCRATCH))
            wait_until_it_builds(running, tmp_path)
            worker.kill()
            _, errors = running.communicate()
    assert running.returncode == 4, errors
    assert f"{tmp_path}/ranks-engine: found that the workers which built it were lost" in errors
    assert whole(tmp_path, "ranks")
    assert not {".headrace-scratch", "ranks-engine", "ranks-engine.partial"} & names(tmp_path)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """The address of a `dask scheduler`, a process of its own without workers."""
    where = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", where]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL) as process:
        try:
            while not where.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield json.loads(where.read_text())["address"]
        finally:
            process.terminate()


@pytest.mark.parametrize("trouble", ["", "once"])
def test_a_scheduler_and_one_worker_with_a_gpu_convert_and_build(scheduler: str, tmp_path: Path, trouble: str) -> None:
    environment = {"STAND_IN_TROUBLE": trouble, "STAND_IN_STATE": str(tmp_path / "state")}
    with gpu_worker(scheduler, tmp_path, **environment):
        wait_for_gpu(scheduler)
        ran = headrace("convert", job(tmp_path, scheduler))
    assert ran.code == (4 if trouble else 0), ran
    assert whole(tmp_path, "one", "two")
    made = {"one-engine", "two-engine"} & names(tmp_path)
    assert len(made) == (1 if trouble else 2)
    (failed,) = {"one-engine", "two-engine"} - made or {""}
    assert f"{tmp_path}/{failed}: " in ran.err or not trouble
    assert "OutOfMemory" in ran.err or not trouble


def test_the_builder_of_the_gpu_s_machine_is_asked_before_the_conversion(cluster: str, tmp_path: Path) -> None:
    job(tmp_path, cluster, "output_dir = 'ranks'\n[engine]\nlora_target_modules = ['attn_qq']\n")
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


@pytest.mark.nightly  # it waits until the dead worker's builder has ended
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
