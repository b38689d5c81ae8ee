"""Measure a conversion from a web server: `python -m benchmarks.remote` (needs nginx and curl).

A bf16 model of 8B's shapes in files of 1 GB behind nginx on this machine, without TLS. It is converted to TP 2 by ranges, and its files
are downloaded by four curl at once, in turns; both write to the same disk.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Run, machine, rounds
from benchmarks.models import make, weights
from pipeline import plan

CONFIGURATION = """
daemon off; worker_processes 2; pid {work}/nginx.pid; error_log {work}/nginx.log; user {user};
events {{ worker_connections 512; }}
http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
        server {{ listen 127.0.0.1:{port}; root {work}/source; }} }}
"""


@contextlib.contextmanager
def nginx(work: Path) -> Iterator[str]:
    """Serve the directory `source` of a directory; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = work / "nginx.conf"
    user = Path("/proc/self").owner()
    file.write_text(CONFIGURATION.format(work=work, port=port, user=user))
    server = subprocess.Popen(["nginx", "-e", str(work / "nginx.log"), "-c", str(file)])
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            if server.poll() is not None:
                raise RuntimeError((work / "nginx.log").read_text())
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def children_seconds() -> float:
    """Processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def said(name: str, runs: list[Run], spent: list[float], nbytes: int) -> str:
    seconds = [run.seconds for run in runs]
    return (
        f"{name}: {nbytes / statistics.median(seconds) / 1e9:.2f} GB/s; {statistics.median(seconds):.1f} s "
        f"[{min(seconds):.1f}-{max(seconds):.1f}], processor {statistics.median(spent):.1f} s "
        f"[{min(spent):.1f}-{max(spent):.1f}], peak {max(run.peak_bytes for run in runs) >> 20} MiB"
    )


def remote(work: Path, layers: int, count: int, scheduler: str) -> None:
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    nbytes = make(work / "source", "8B", layers=layers, noise=weights(), shard_bytes=1 << 30)
    files = sorted(path.name for path in (work / "source").glob("*.safetensors"))
    with nginx(work) as url:
        projected = plan(model_dir=url, output_dir=work / "ranks", tp_size=2, use_parallel_embedding=True).budget.peak_bytes
        # Each rank with half of the embedding: as many bytes are written as are downloaded.
        split = ["--tp_size", "2", "--use_parallel_embedding"]
        flags = ["--quiet", "--model_dir", url, "--output_dir", str(work / "ranks"), *split, "--scheduler", scheduler]
        # A file after the other by each of four.
        queues = [" ".join(f"-o {work}/files/{name} {url}/{name}" for name in files[n::4]) for n in range(min(4, len(files)))]
        download = f"mkdir {work}/files && " + " ".join(f"curl -sS {queue} &" for queue in queues) + " wait"
        commands = {
            "headrace": ([sys.executable, "-m", "pipeline.cli", "convert", *flags], work / "ranks"),
            "curl": (["sh", "-c", download], work / "files"),
        }
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        spent: dict[str, list[float]] = {name: [] for name in commands}
        marks: list[tuple[str, float]] = []
        for number in range(count):
            turn = dict(sorted(commands.items(), reverse=bool(number % 2)))
            for name, (run,) in rounds(turn, 1, lambda name: marks.append((name, children_seconds()))).items():
                runs[name].append(run)
            marks.append(("", children_seconds()))
            for (name, begun), (_, ended) in itertools.pairwise(marks[-3:]):
                spent[name].append(ended - begun)
            took = ", ".join(f"{name} {runs[name][-1].seconds:.1f} s" for name in turn)
            print(f"round {number + 1}: {took}", flush=True)
    for name in commands:
        print(said(name, runs[name], spent[name], nbytes), flush=True)
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(runs["headrace"], runs["curl"], strict=True)]
    print(
        f"headrace, {scheduler}: {statistics.median(ratios):.2f} of curl's throughput (rounds {min(ratios):.2f} to {max(ratios):.2f}); "
        f"{nbytes / 1e9:.1f} GB, projected peak {projected >> 20} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with room for the model three times")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scheduler", default="threads", choices=("local", "threads"))
    arguments = parser.parse_args()
    work = arguments.work.absolute() / "remote"
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    try:
        remote(work, arguments.layers, arguments.rounds, arguments.scheduler)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
