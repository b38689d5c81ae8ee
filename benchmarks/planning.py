"""Measure what a plan of a mixture of experts costs, and scheduling it: `python -m benchmarks.planning`.

A model of 94 layers of 128 experts, 36,945 tensors, in sparse files; eight ranks, as it is and to int8. Each is planned in a process
of its own, which prints processor seconds, start-up included, and its peak memory beside the projected one; then its graph runs on
the in-process cluster, with tasks that do nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.models import make
from pipeline import plan
from pipeline.planning.bind import bind
from pipeline.planning.dask_graph import stage_graph
from pipeline.planning.memory import MIB
from pipeline.run.schedulers import runner, thread_name
from pipeline.tensor.process import peak_memory_bytes
from stages.write import Written
from stages.write.deliveries import BlockWrite

TARGETS = {"dense": {}, "int8": {"use_weight_only": True}}
RANKS = {"tp_size": 8, "moe_ep_size": 8}


def nothing(number: int, work: Sequence[BlockWrite], *_: Any) -> Written:
    """Stand in for `write_group` without reading or writing."""
    return Written(number, work[-1].name, 0, 0, {}, (), ())


def measured(source: Path, target: str, scheduler: str = "") -> dict[str, float]:
    """Plan in this process, and run the plan's graph without I/O where a scheduler is given: processor seconds and MiB."""
    planned = plan(model_dir=source, output_dir=source / "none", **RANKS, **TARGETS[target])
    planned.summary()
    result = {
        "tensors": len(planned.source.tensors),
        "plan_seconds": time.process_time(),
        "plan_mib": peak_memory_bytes() / MIB,
        "projected_mib": planned.budget.peak_bytes / MIB,
    }
    if not scheduler:
        return result
    from benchmarks.planning import nothing  # by this name a worker finds it, whatever module is run

    begun, clock = time.process_time(), time.perf_counter()
    with runner(scheduler, planned.budget.workers) as session:
        groups = [bind(planned, 0, index, (0,)) for index in range(planned.tasks)]
        graph = stage_graph(groups, name=int if session.client else thread_name, run=nothing)
        assert sum(1 for _ in session.run(graph)) == planned.tasks
    spent = {"run_seconds": time.process_time() - begun, "run_wall_seconds": time.perf_counter() - clock}
    return {**result, "tasks": len(graph), **spent, "run_mib": peak_memory_bytes() / MIB}


def apart(source: Path, target: str, scheduler: str = "") -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.planning", "--source", str(source), "--target", target, "--scheduler", scheduler]
    values: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return values


def planning(work: Path) -> None:
    source = work / "mixture"
    make(source, "235B", sparse=True)
    for target in TARGETS:
        alone = apart(source, target)
        print(
            f"mixture of {alone['tensors']:,.0f} tensors, {target}: planned in {alone['plan_seconds']:.1f} s of processor time, "
            f"peak {alone['plan_mib']:.0f} MiB, {alone['projected_mib']:.0f} MiB projected",
            flush=True,
        )
        for scheduler in ("threads", "local"):
            run = apart(source, target, scheduler)
            print(
                f"  no-op I/O, {scheduler}: {run['tasks']:,.0f} tasks in {run['run_wall_seconds']:.1f} s, {run['run_seconds']:.1f} s of "
                f"processor time (cluster started and stopped), peak {run['run_mib']:.0f} MiB",
                flush=True,
            )
    shutil.rmtree(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory; the model's files are sparse")
    parser.add_argument("--source", type=Path, help="measure one target of this model, and print JSON")
    parser.add_argument("--target", choices=list(TARGETS), default="dense")
    parser.add_argument("--scheduler", default="", help="of --source: run the graph as well")
    arguments = parser.parse_args()
    if arguments.source:
        print(json.dumps(measured(arguments.source, arguments.target, arguments.scheduler)))
        return
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    planning(work)


if __name__ == "__main__":
    main()
