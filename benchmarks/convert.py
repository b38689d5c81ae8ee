"""Measure the memory of a dense conversion, and the cost of scheduling alone: `python -m benchmarks.convert`.

Peak memory is measured at 4 GB and 16 GB of 8B-shaped bf16; scheduling with plans of 70B and 405B models whose tasks do nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, run
from benchmarks.models import make
from pipeline import plan
from pipeline.planning.bind import bind
from pipeline.planning.dask_graph import stage_graph
from pipeline.run.schedulers import runner, thread_name
from stages.write import Written
from stages.write.deliveries import BlockWrite

HEADRACE = [sys.executable, "-m", "pipeline.cli", "convert", "--quiet"]


def command(source: Path, output: Path, tp_size: int, scheduler: str) -> list[str]:
    return [*HEADRACE, "--model_dir", str(source), "--output_dir", str(output), "--tp_size", str(tp_size), "--scheduler", scheduler]


def memory(work: Path) -> None:
    for layers, name in ((5, "4 GB"), (32, "16 GB")):
        source, output = work / f"sparse{layers}", work / "output"
        make(source, "8B", layers=layers, sparse=True)
        for scheduler in ("threads", "local"):
            peak = run(command(source, output, 2, scheduler), remove=output)
            shutil.rmtree(output)
            print(
                f"memory at {name}, {scheduler}: VmHWM {peak.peak_bytes >> 20} MiB, anonymous {peak.anonymous_bytes >> 20} MiB",
                flush=True,
            )


def nothing(number: int, work: Sequence[BlockWrite], *_: Any) -> Written:
    """Stand in for `write_group` without reading or writing."""
    return Written(number, work[-1].name, 0, 0, {}, (), ())


def overhead(work: Path) -> None:
    for shape, sizes in (("70B", {"tp_size": 8}), ("405B", {"tp_size": 16, "pp_size": 2})):
        source = work / shape
        make(source, shape, sparse=True)
        for scheduler in ("threads", "local"):
            start = time.perf_counter()
            planned = plan(model_dir=source, output_dir=work / "none", **sizes)
            ready = time.perf_counter()
            with runner(scheduler, planned.budget.workers) as session:
                groups = [bind(planned, 0, index, (0,)) for index in range(planned.tasks)]
                graph = stage_graph(groups, name=int if session.client else thread_name, run=nothing)
                tasks = len(graph)
                done = sum(1 for _ in session.run(graph))
                assert done == planned.tasks
            end = time.perf_counter()
            text = f"planned in {ready - start:.1f} s, {tasks} tasks scheduled in {end - ready:.1f} s (cluster started and stopped)"
            print(f"{shape} {sizes}, no-op I/O, {scheduler}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 20 GB free")
    parser.add_argument("--only", choices=["memory", "overhead"], help="one part")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    if arguments.only in (None, "overhead"):
        overhead(work)
    if arguments.only in (None, "memory"):
        memory(work)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
