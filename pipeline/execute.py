"""Run a plan: begin its outputs, compute its tasks, finish the outputs. The only module that computes."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import BadInput, Interrupted, WriteFailed
from pipeline.lower import lower
from pipeline.plans import Plan
from pipeline.schedulers import runner

if TYPE_CHECKING:
    from stages.write import Written


class Listener(Protocol):
    """What hears of a run: each method is called from the thread that called `execute`."""

    def started(self, plan: Plan, dashboard: str) -> None: ...
    def advanced(self, written: Written) -> None: ...
    def finished(self) -> None: ...


class Silent:
    """A listener that says nothing."""

    def started(self, plan: Plan, dashboard: str) -> None:
        """Say nothing."""

    def advanced(self, written: Written) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Result:
    """What a conversion did. `stages`: seconds and bytes by stage, summed over workers. Sizes in bytes, times in seconds."""

    outputs: tuple[Path, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    stages: Mapping[str, Mapping[str, float]] = field(repr=False)
    up_to_date: bool = False


def execute(plan: Plan, listener: Listener | None = None, *, started: float | None = None) -> Result:
    """Do what a plan says. `started` is when the run began, by time.perf_counter(), where planning is to be counted.

    Raises BadInput where an output directory is taken or has no room, Interrupted on Ctrl-C or SIGTERM, and WriteFailed where
    the disk or a worker fails; what was written by then is still named `*.partial`.
    """
    started = time.perf_counter() if started is None else started
    outputs = tuple(path for target in plan.targets for path in target.output.paths)
    if plan.up_to_date and not plan.job.overwrite:
        return Result(outputs, 0, 0, time.perf_counter() - started, peak_memory_bytes(), {}, up_to_date=True)
    obstacles = plan.obstacles()
    if obstacles:
        raise BadInput(obstacles)
    listener = listener or Silent()
    totals: dict[str, dict[str, float]] = {}
    bytes_read = 0
    try:
        with runner(plan.job.scheduler, plan.budget.workers) as (run, dashboard):
            for target in plan.targets:
                target.output.begin()
            listener.started(plan, dashboard)
            for written in run(lower(plan)):
                bytes_read += written.bytes_read
                for (stage, unit), value in written.metrics.items():
                    stage_totals = totals.setdefault(stage, {})
                    stage_totals[unit] = stage_totals.get(unit, 0.0) + value
                listener.advanced(written)
        for target in plan.targets:
            seconds = round(time.perf_counter() - started, 3)
            target.output.finish(plan.provenance({"seconds": seconds, "stages": totals}))
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_places(plan)} is not complete: run the same command again") from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror or error}{place}; {_places(plan)} is not complete: mend this and run the same command again"
        raise WriteFailed(text) from error
    finally:
        listener.finished()
    return Result(outputs, bytes_read, plan.bytes_written, time.perf_counter() - started, peak_memory_bytes(), totals)


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far, mapped file pages included (VmHWM)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _places(plan: Plan) -> str:
    return ", ".join(str(target.output.directory) for target in plan.targets)
