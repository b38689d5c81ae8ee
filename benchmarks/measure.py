"""Time whole commands in alternating pairs, and sample the memory of a process while it runs."""

from __future__ import annotations

import os
import platform
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One finished command: wall-clock seconds, peak resident memory (VmHWM) and peak anonymous memory, both in bytes."""

    seconds: float
    peak_bytes: int
    anonymous_bytes: int


def run(command: list[str], remove: Path | None = None) -> Run:
    """Delete the directory `remove`, sync, and run a command. Raises RuntimeError where it fails."""
    if remove:
        shutil.rmtree(remove, ignore_errors=True)
    os.sync()
    # Where nothing may be compiled ahead, every start would compile all modules, as no installed command does.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks))
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{errors.decode()}")
    return Run(seconds, peaks["VmHWM"], peaks["RssAnon"])


def _watch(pid: int, peaks: dict[str, int]) -> None:
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        sampled = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}
        if not sampled:
            return
        for key, value in sampled.items():
            peaks[key] = max(peaks[key], value)
        time.sleep(0.02)


Runs = dict[str, list[Run]]


@dataclass(frozen=True)
class Pairs:
    """Runs of a command (`ours`) and of the one that it is compared with (`theirs`), in alternation."""

    ours: list[Run]
    theirs: list[Run]

    def row(self) -> str:
        """Return the ratios, seconds and memory as one line of text."""
        ratios = [a.seconds / b.seconds for a, b in zip(self.ours, self.theirs, strict=True)]
        ours, theirs = [r.seconds for r in self.ours], [r.seconds for r in self.theirs]
        return (
            f"median {statistics.median(ratios):.2f} x cp (pairs {min(ratios):.2f} to {max(ratios):.2f});"
            f" {statistics.median(ours):.1f} s [{min(ours):.1f}-{max(ours):.1f}] against"
            f" {statistics.median(theirs):.1f} s [{min(theirs):.1f}-{max(theirs):.1f}];"
            f" VmHWM {max(r.peak_bytes for r in self.ours) >> 20} MiB, anonymous {max(r.anonymous_bytes for r in self.ours) >> 20} MiB"
        )


def pairs(command: list[str], output: Path, reference: Path, count: int) -> Pairs:
    """Time `command`, which writes `output`, against `cp -r` of `reference` (as many bytes), in the order A B B A A B ..."""
    copy = output.with_name("copy")
    ours, theirs = [], []
    for number in range(count):
        order = ("ours", "theirs") if number % 2 else ("theirs", "ours")
        for which in order:
            if which == "ours":
                ours.append(run(command, remove=output))
                shutil.rmtree(output)
            else:
                theirs.append(run(["cp", "-r", str(reference), str(copy)], remove=copy))
                shutil.rmtree(copy)
    return Pairs(ours, theirs)


def rounds(commands: Mapping[str, tuple[list[str], Path | None]], count: int, before: Callable[[str], None] | None = None) -> Runs:
    """Time some commands, each with the directory that it writes or None, once a round, in an order that is random each time.

    `before`: called with a command's name before it is run. What is written is removed. Returns the runs of each.
    """
    order, runs = random.Random(0), {name: list[Run]() for name in commands}
    for _ in range(count):
        for name in order.sample(list(commands), len(commands)):
            command, output = commands[name]
            if before:
                before(name)
            runs[name].append(run(command, remove=output))
            if output:
                shutil.rmtree(output)
    return runs


def machine() -> str:
    """Describe the machine in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    return f"{os.cpu_count()} cores ({model}), {memory} GiB, Linux {platform.release()}, Python {platform.python_version()}"
