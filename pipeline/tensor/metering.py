"""Seconds and bytes of each stage, measured inside a fused task.

A task does the work of several stages. What each took is added up for the run's own summary and, where the task ends on a Dask
worker, handed to Dask's context meter, which shows it on the dashboard under Fine Performance Metrics.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_local = threading.local()


@contextmanager
def collect() -> Iterator[dict[tuple[str, str], float]]:
    """Gather what `meter` records on this thread: {(stage, "seconds" | "bytes"): total}."""
    totals: dict[tuple[str, str], float] = {}
    previous, _local.totals = getattr(_local, "totals", None), totals
    try:
        yield totals
    finally:
        _local.totals = previous
        # Only on a Dask worker is the module loaded; importing it for other schedulers would cost start-up time.
        dask_metrics = sys.modules.get("distributed.metrics")
        if dask_metrics is not None:
            for (stage, unit), total in totals.items():  # once a task: a piece takes less time than its record would
                dask_metrics.context_meter.digest_metric(stage, total, unit)


@contextmanager
def meter(stage: str, nbytes: int) -> Iterator[None]:
    """Record the seconds spent inside, and `nbytes`, as `stage`'s."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        totals = getattr(_local, "totals", None)
        if totals is not None:
            totals[stage, "seconds"] = totals.get((stage, "seconds"), 0.0) + seconds
            totals[stage, "bytes"] = totals.get((stage, "bytes"), 0.0) + nbytes


def stage_bytes(stages: Mapping[str, Mapping[str, float]], stage: str) -> int:
    """The bytes that a stage has handled, of seconds and bytes by stage."""
    return int(stages.get(stage, {}).get("bytes", 0))
