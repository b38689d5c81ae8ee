"""Measure what crash safety costs: resuming, the journal and checksums, flushing to disk: `python -m benchmarks.survive`.

The source is 4 GB of 8B-shaped bf16, on the threads scheduler. Every figure is a ratio of whole commands that ran in alternation.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import machine, run
from benchmarks.models import make

HEADRACE = [sys.executable, "-m", "pipeline.cli", "convert", "--quiet", "--scheduler", "threads"]
# The command line without journal entries and without hashing.
BARE = """
import sys, types
import pipeline.sinks.journal
pipeline.sinks.journal.Committer.commit = lambda self: None
pipeline.sinks.journal.Committer.sync = lambda self: None
import xxhash
class Nothing:
    def update(self, data): pass
    def hexdigest(self): return ""
import stages.write
stages.write.xxhash = types.SimpleNamespace(xxh3_64=Nothing)
from pipeline.cli import main
main()
"""


def command(source: Path, output: Path, *more: str) -> list[str]:
    return [*HEADRACE, "--model_dir", str(source), "--output_dir", str(output), *more]


def ratios(name: str, ours: list[float], theirs: list[float], baseline: str) -> None:
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    text = f"median {statistics.median(each):.2f} x {baseline} ({min(each):.2f} to {max(each):.2f})"
    print(f"{name}: {text}; {statistics.median(ours):.1f} s against {statistics.median(theirs):.1f} s", flush=True)


def resume(source: Path, work: Path, count: int) -> None:
    whole, halves = [], []
    for _ in range(count):
        one = command(source, work / "one", "--tp_size", "2")
        whole.append(run(one, remove=work / "one").seconds)
        shutil.rmtree(work / "one")
        start = time.perf_counter()
        first = subprocess.Popen(one, stderr=subprocess.DEVNULL)
        time.sleep(whole[-1] / 2)
        first.send_signal(signal.SIGINT)
        code = first.wait()
        seconds = time.perf_counter() - start
        if code != 3:
            raise RuntimeError(f"the first half exited with {code}, not interrupted")
        halves.append(seconds + run(one).seconds)
        shutil.rmtree(work / "one")
    ratios("stopped half-way and resumed, both runs", halves, whole, "one uninterrupted run")


def price(source: Path, work: Path, count: int) -> None:
    full, bare = [], []
    for number in range(count):
        ours = command(source, work / "one", "--tp_size", "2")
        plain = [sys.executable, "-c", BARE, *ours[3:]]
        for which in ("full", "bare") if number % 2 else ("bare", "full"):
            seconds = run(ours if which == "full" else plain, remove=work / "one").seconds
            (full if which == "full" else bare).append(seconds)
            shutil.rmtree(work / "one")
    ratios("journal and checksums", full, bare, "neither")


def durable(source: Path, work: Path, count: int) -> None:
    synced, plain = [], []
    for _ in range(count):
        plain.append(run(command(source, work / "one", "--tp_size", "2"), remove=work / "one").seconds)
        synced.append(run(command(source, work / "one", "--tp_size", "2", "--sync"), remove=work / "one").seconds)
        shutil.rmtree(work / "one")
    ratios("--sync: all bytes on disk before it ends", synced, plain, "without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 20 GB free")
    parser.add_argument("--only", choices=["resume", "price", "durable"], help="one part")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, also by what is started there
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    source = work / "8B"
    print(f"source: {make(source, '8B', layers=5) / 1e9:.2f} GB of 8B-shaped bf16")
    for part in (price, durable, resume):
        if arguments.only in (None, part.__name__):
            part(source, work, arguments.runs)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
