"""Batches on a Dask cluster of several processes: what the loss of a part of it leaves; nothing twice, and the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert
from pipeline.watching.units import human_bytes
from tests.support import checkpoints
from tests.support.commands import COMMAND
from tests.support.directories import contents
from tests.support.witness import Witness, gone, wait

SECONDS = 60.0
STATED = 15.0  # what docs/batches.md says of how soon conversions end that nobody waits for


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, place: Path, stack: ExitStack, environment: dict[str, str]) -> None:
        self.place, self.stack, self.environment = place, stack, environment
        file = place / "scheduler.json"
        self.scheduler = self._started(
            "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
        )
        wait(file.exists, SECONDS)
        wait(lambda: file.read_text().endswith("}"), SECONDS)
        self.address = str(json.loads(file.read_text())["address"])

    def worker(self, memory: int = 1 << 30) -> subprocess.Popen[bytes]:
        options = ("--no-nanny", "--nthreads", "6", "--resources", f"MEMORY={memory}", "--no-dashboard", "--memory-limit", "0")
        return self._started("dask_worker", self.address, *options, "--local-directory", str(self.place / "dask"))

    def _started(self, *words: str) -> subprocess.Popen[bytes]:
        module, *rest = words
        process = subprocess.Popen([sys.executable, "-m", f"distributed.cli.{module}", *rest], env=self.environment)
        self.stack.callback(lambda: (process.kill(), process.wait()))
        return process


@contextmanager
def batch(cluster: Cluster, *words: object) -> Iterator[subprocess.Popen[str]]:
    command = [*COMMAND, "batch", *map(str, words), "--scheduler", cluster.address, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=cluster.environment) as process:
        yield process
        process.kill()


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    for seed, name in enumerate("abc"):
        checkpoints.write(tmp_path / name, checkpoints.LLAMA, seed=seed)
    return Witness(tmp_path)


@pytest.fixture
def cluster(tmp_path: Path, witness: Witness) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack, witness.environment)


def matrix(place: Path) -> tuple[object, ...]:
    models = [word for name in "abc" for word in ("--model_dir", place / name)]
    return (*models, "--output_dir", place / "out-{model}", "--attempts", "2")


def planned(place: Path) -> int:
    """The most memory that one of the conversions takes, as planned, in bytes."""
    command = [*COMMAND, "batch", *map(str, matrix(place)), "--dry_run", "--json"]
    units = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["units"]
    return max(int(unit["peak_memory_bytes"]) for unit in units)


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(process.communicate(timeout=SECONDS)[0])
    return value


def check(place: Path, names: str = "abc") -> None:
    for name in names:
        alone = place / "alone" / name
        convert(model_dir=place / name, output_dir=alone, scheduler="threads")
        assert contents(place / f"out-{name}") == contents(alone)


def test_a_worker_that_is_killed_takes_its_conversions_with_it_and_others_do_them(
    tmp_path: Path, witness: Witness, cluster: Cluster
) -> None:
    workers = [cluster.worker() for _ in range(3)]
    witness.hold("out-a", "out-b", "out-c")
    with batch(cluster, *matrix(tmp_path)) as process:
        wait(lambda: all(witness.pids("work", f"out-{name}") for name in "abc"), SECONDS, witness.log)
        (child,) = witness.pids("work", "out-b")
        parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        wait(lambda: gone(child), STATED)
        wait(lambda: len(witness.pids("work", "out-b")) == 2, SECONDS, witness.log)
        witness.let("out-a", "out-b", "out-c")
        result = said(process)
    assert [job["outcome"] for job in result["jobs"]] == ["done"] * 3
    assert parent in [worker.pid for worker in workers]
    assert not [line for line in witness.log() if line[0] == "overlap"]
    check(tmp_path)


@pytest.mark.parametrize("lost", ["client", "scheduler"])
def test_conversions_end_in_time_when_nobody_waits_for_them(tmp_path: Path, witness: Witness, cluster: Cluster, lost: str) -> None:
    cluster.worker()
    witness.hold("out-a", "out-b", "out-c")
    with batch(cluster, *matrix(tmp_path)) as process:
        wait(lambda: witness.pids("work", "out-a"), SECONDS, witness.log)
        (process if lost == "client" else cluster.scheduler).kill()
        children = [int(line[1]) for line in witness.log()]
        wait(lambda: all(map(gone, children)), STATED, witness.log)
        if lost == "scheduler":
            result = said(process)
            assert (process.returncode, {job["exit_code"] for job in result["jobs"]}) == (3, {3}), result
    witness.let("out-a", "out-b", "out-c")
    assert not list(tmp_path.glob("out-*/config.json"))
    # What they have left is taken up again.
    again = subprocess.run([*COMMAND, "batch", *map(str, matrix(tmp_path))], env=cluster.environment, check=False)
    assert again.returncode == 0
    check(tmp_path)


def test_two_batches_on_one_cluster_stay_within_its_memory(tmp_path: Path, witness: Witness, cluster: Cluster) -> None:
    names = [f"{kind}-{name}" for kind in ("out", "more") for name in "abc"]
    peak = planned(tmp_path)
    cluster.worker(memory=4 * peak + peak // 2)
    witness.hold(*names)
    more = [str(word).replace("out-", "more-") for word in matrix(tmp_path)]
    with batch(cluster, *matrix(tmp_path)) as first, batch(cluster, *more) as second:
        wait(lambda: len([line for line in witness.log() if line[0] == "work"]) == 4, SECONDS, witness.log)
        time.sleep(2)
        assert len([line for line in witness.log() if line[0] == "start"]) == 4, "two more wait for memory"
        witness.let(*names)
        assert [job["outcome"] for process in (first, second) for job in said(process)["jobs"]] == ["done"] * 6
    check(tmp_path)


def test_what_no_worker_can_take_is_refused_with_both_figures(tmp_path: Path, witness: Witness, cluster: Cluster) -> None:
    peak = planned(tmp_path)
    cluster.worker(memory=peak // 2)
    with batch(cluster, *matrix(tmp_path)) as process:
        result = said(process)
    assert (result["exit_code"], {job["outcome"] for job in result["jobs"]}) == (2, {"refused"})
    offered, needed = human_bytes(peak // 2), human_bytes(peak)
    assert f"workers that offer at most {offered} of MEMORY; expected one with {needed}" in result["jobs"][0]["error"]
    assert witness.log() == []


def test_a_job_that_names_the_cluster_itself_does_not_wait_for_the_slot_that_it_holds(
    tmp_path: Path, witness: Witness, cluster: Cluster
) -> None:
    cluster.worker(memory=0)
    job = tmp_path / "job.toml"
    job.write_text(f'model_dir = "a"\noutput_dir = "out-a"\nscheduler = "{cluster.address}"\n')
    with batch(cluster, job) as process:
        result = said(process)
    assert [each["outcome"] for each in result["jobs"]] == ["done"]
    assert len(witness.pids("start", "out-a")) == 1
    check(tmp_path, "a")
