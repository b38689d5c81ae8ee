"""Measure clusters: `python -m benchmarks.scale`.

Three parts, of which `--only` chooses one:

workers     a dense and an int8 conversion of 3.8 GB on 1, 2 and 4 worker processes of one thread each. Workers elsewhere bring to the
            disk what they write: with --work on a file system in memory it is the processor that is measured
scheduler   the plan of a 405B model through a scheduler and workers that are processes, with tasks that do nothing: its processor time
schedule    that plan to TP 16 on 32 workers, with tasks that take as long as their bytes would and do nothing meanwhile: the length of
            the schedule that Dask's own scheduler makes of it, against an even share of the work for each. All workers and the
            scheduler are in this process, whose own work counts as theirs: at more than half a GB/s it is that which is measured
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import machine
from benchmarks.models import make, weights
from pipeline import convert, plan
from pipeline.planning.bind import bind
from pipeline.planning.dask_graph import StageGraph, stage_graph
from pipeline.planning.plans import Plan
from pipeline.run.schedulers import run_distributed
from pipeline.tensor.placement import size
from stages.write import Written
from stages.write.deliveries import BlockWrite

WORKERS, RATE = 32, 0.4  # machines, and the GB that one writes a second
WORK: dict[str, dict[str, Any]] = {"dense": {}, "int8": {"use_weight_only": True}}
SPREAD = 0.25  # of what tasks take, to either side of what their bytes would, as measured on shared disks


def nothing(number: int, work: Sequence[BlockWrite], *_: Any, **__: Any) -> Written:
    """Stand in for `write_group` without reading or writing."""
    return Written(number, work[-1].name, 0, 0, {}, (), ())


def waiting(number: int, work: Sequence[BlockWrite], *_: Any, rate: float, spread: float, **__: Any) -> Written:
    """Stand in for `write_group`: take as long as its bytes would at a rate. Its metrics say from when to when."""
    begun = time.time()
    time.sleep(bytes_of(work) / (rate * 1e9) * random.Random(number).uniform(1 - spread, 1 + spread))
    return Written(number, work[-1].name, 0, 0, {("begun", "seconds"): begun, ("ended", "seconds"): time.time()}, (), ())


def bytes_of(work: Sequence[BlockWrite]) -> int:
    """The bytes that a task writes, of two to a value."""
    return sum(2 * size(to.source) for item in work for sink in item.deliveries for to in sink)


def graph_of(planned: Plan, run: Callable[..., Any], **arguments: Any) -> StageGraph:
    """The graph of a dense plan with another function where bytes would move."""
    groups = [bind(planned, 0, index, (0,)) for index in range(planned.tasks)]
    return stage_graph(groups, run=run, **arguments)


@contextmanager
def cluster(workers: int, processes: bool) -> Iterator[Any]:
    """A client of a cluster of workers of one thread: in processes, the scheduler in this one; or all in this one."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=processes, dashboard_address=":0", memory_limit=None
        ) as made,
        Client(made, set_as_default=False) as client,
    ):
        client.wait_for_workers(workers)
        yield client


def on_workers(work: Path, source: Path, counts: Sequence[int]) -> None:
    """Convert on so many workers, dense and to int8."""
    for name, options in WORK.items():
        base = 0.0
        for count in counts:
            with cluster(count, processes=True) as client:
                address = client.scheduler.address
                before = cpu_of_workers(client)
                result = convert(model_dir=source, output_dir=work / "out", tp_size=2, scheduler=address, **options)
                spent = cpu_of_workers(client) - before
            shutil.rmtree(work / "out")
            base = base or result.seconds
            print(
                f"{name}, {count} workers: {result.seconds:.1f} s, {base / result.seconds:.2f} times as fast as one; "
                f"{spent:.1f} s of the workers' processor time",
                flush=True,
            )


def cpu_of_workers(client: Any) -> float:
    """Seconds of processor time of all worker processes so far."""
    return sum(client.run(lambda: sum(psutil.Process().cpu_times()[:2])).values())


def scheduler_cost(planned: Plan) -> None:
    """Run the plan with tasks that do nothing."""
    from benchmarks.scale import nothing  # by this name a worker finds it, whatever module is run

    begun, clock = time.process_time(), time.perf_counter()
    graph = graph_of(planned, nothing)
    bound = time.process_time() - begun
    with cluster(2, processes=True) as client:
        begun, clock = time.process_time(), time.perf_counter()
        assert sum(1 for _ in run_distributed(client, graph)) == planned.tasks
        spent, seconds = time.process_time() - begun, time.perf_counter() - clock
    print(
        f"405B TP 16: {len(graph):,} tasks of {planned.tasks:,} groups, bound in {bound:.1f} s; client and scheduler took {spent:.1f} s of "
        f"processor time, {1e3 * spent / len(graph):.2f} ms a task, in {seconds:.1f} s",
        flush=True,
    )


def schedule(planned: Plan, workers: int, rate: float) -> float:
    """Print and return an even schedule's share of Dask's. `rate`: GB that a worker writes a second."""
    from benchmarks.scale import waiting

    graph = graph_of(planned, waiting, rate=rate, spread=SPREAD)
    with cluster(workers, processes=False) as client:
        ended = [result.metrics for result in run_distributed(client, graph)]
    spans = [(each["begun", "seconds"], each["ended", "seconds"]) for each in ended]
    work = sum(end - begin for begin, end in spans)
    length = max(end for _, end in spans) - min(begin for begin, _ in spans)
    even = work / workers
    longest = max(end - begun for begun, end in spans)
    print(
        f"405B TP 16 on {workers} workers of {rate:g} GB/s: {length:.1f} s, even shares {even:.1f} s, {even / length:.1%}; "
        f"the longest task {longest:.2f} s",
        flush=True,
    )
    return even / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="a directory with 8 GB free")
    parser.add_argument("--layers", type=int, default=4, help="of the model that is converted")
    parser.add_argument("--only", choices=("workers", "scheduler", "schedule"))
    parser.add_argument("--workers", type=int, default=WORKERS, help="of the schedule")
    parser.add_argument("--rate", type=float, default=RATE, help="GB that each of them writes a second")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(machine())
    if arguments.only in (None, "workers"):
        make(work / "source", "8B", layers=arguments.layers, noise=weights())
        on_workers(work, work / "source", (1, 2, 4))
        shutil.rmtree(work / "source")
    if arguments.only != "workers":
        make(work / "405B", "405B", sparse=True)
        planned = plan(model_dir=work / "405B", output_dir=work / "none", tp_size=16, pp_size=1, use_parallel_embedding=True)
        shutil.rmtree(work / "405B")
        if arguments.only in (None, "scheduler"):
            scheduler_cost(planned)
        if arguments.only in (None, "schedule"):
            schedule(planned, arguments.workers, arguments.rate)


if __name__ == "__main__":
    main()
