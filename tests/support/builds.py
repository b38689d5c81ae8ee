"""`headrace build` as the tests call it, and what they ask of its outcome."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.run.schedulers import runner
from tests import stand_ins
from tests.support.commands import COMMAND, Ran, headrace


def build(checkpoint: object, engine: object, *more: object) -> Ran:
    return headrace("build", checkpoint, "--output_dir", engine, "--scheduler", "threads", *more)


def nvidia_smi(folder: Path, *lines: str, code: int = 0) -> None:
    """A stand-in that says what `--query-gpu=compute_cap --format=csv,noheader` asks for."""
    program = folder / "nvidia-smi"
    said = "\\n".join(lines)
    program.write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] || exit 9\nprintf "{said}\\n"\nexit {code}\n')
    program.chmod(0o755)


def provenance(engine: Path) -> dict[str, Any]:
    return json.loads((engine / "headrace.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


def start(*arguments: object, command: Sequence[str] = COMMAND, **environment: str) -> subprocess.Popen[str]:
    """The command line as a process of its own, with more in its environment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, arguments)], env={**os.environ, **environment}, text=True, **pipes)


def wait_for_line(running: subprocess.Popen[str], part: str) -> list[str]:
    """The lines of standard error up to one that holds `part`."""
    assert running.stderr
    lines: list[str] = []
    while not lines or part not in lines[-1]:
        lines.append(running.stderr.readline())
        assert lines[-1], lines
    return lines
