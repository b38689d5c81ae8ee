"""The outlook of a plan on this machine: what an earlier run has done of it, and how long the rest may take."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipeline.errors import HeadraceError
from pipeline.planning.bind import bind
from pipeline.planning.plans import Plan
from pipeline.run.left_to_do import LeftToDo, PhaseLeft
from pipeline.tensor.blocks import make_blocks
from stages.write.sample import try_blocks

SAMPLE_SECONDS = 0.1  # of work that is tried, for a whole plan
SAMPLES = 5  # groups of a phase that are tried
START_SECONDS = {"local": 0.6, "threads": 0.2, "synchronous": 0.1}  # until a scheduler is there, and after the last task
TASK_SECONDS = 0.002  # of scheduling


@dataclass(frozen=True)
class Outlook:
    """The state in which `convert` would find its outputs, and the time that it may take.

    `done_tasks`: of `tasks`, those that an interrupted run has done. `seconds`: the estimate for the rest, from `sample_seconds` of
    measuring; None where nothing on this machine could be measured.
    """

    done_tasks: int
    tasks: int
    seconds: float | None
    sample_seconds: float


def foresee(plan: Plan) -> Outlook:
    """Look at what is there, and try a little of the work for a moment. Nothing is written."""
    done = done_tasks(plan)
    begun = time.perf_counter()
    seconds = None if plan.up_to_date and not plan.job.overwrite else _estimate(plan, 1 - done / max(plan.tasks, 1))
    return Outlook(done, plan.tasks, seconds, time.perf_counter() - begun)


def done_tasks(plan: Plan) -> int:
    """How many of a plan's tasks a run would leave out, as an interrupted one has done them."""
    if plan.job.overwrite or not any(_entries(sink, phase.tasks) for phase in plan.phases for sink in phase.sinks):
        return 0
    left = _Looked(plan)
    with ExitStack() as stack:
        left.begin(stack)
    return sum(len(each.phase.groups) - len(each.groups) for each in left.phases if each.sinks)


@dataclass
class _Seen:
    """The entries of a journal that nobody has opened."""

    entries: list[dict[str, Any]]

    def close(self) -> None:
        """There is nothing to close."""


class _Looked(LeftToDo):
    """The rest of a plan, where nothing is begun and nothing locked."""

    def _begin_sink(self, left: PhaseLeft, number: int, fresh: bool, stack: ExitStack) -> None:  # noqa: ARG002
        seen: Any = _Seen(_entries(left.phase.sinks[number], left.phase.tasks))
        left.journals[number], left.created[number] = seen, None

    def _begin_calibration(self, stack: ExitStack) -> None:
        """Layers are no tasks that are counted."""


def _entries(sink: Any, tasks: str) -> list[dict[str, Any]]:
    return [] if sink.complete else list(sink.begun(tasks))


def _estimate(plan: Plan, share: float) -> float | None:
    """Seconds that `share` of a plan may take; None for workers or sources elsewhere, and for one that is refused."""
    if plan.job.elsewhere or "://" in plan.source.place or plan.source.in_memory:
        return None
    if plan.calibrating and plan.calibrating.unfit():  # it is refused, and nothing comes of scales of zero
        return None
    workers = min(plan.budget.workers, os.cpu_count() or 1)
    seconds, rate = 0.0, 0.0
    for number, phase in enumerate(plan.phases):
        nbytes = phase.written_bytes(range(len(phase.sinks)))
        # Chunks of scratch are not there to be tried: a later phase is taken to be as quick as the first.
        rate = rate or _rate(plan, number)
        seconds += nbytes / rate if rate else 0.0
    if not rate:
        return None
    return START_SECONDS.get(plan.job.scheduler, 0.5) + share * (seconds / workers + plan.tasks * TASK_SECONDS)


def _rate(plan: Plan, number: int) -> float:
    """Bytes a second that one thread makes, from a moment of work on some groups of a phase; 0 where it cannot be tried."""
    groups, sinks = plan.phases[number].groups, range(len(plan.phases[number].sinks))
    count = min(SAMPLES, len(groups))
    made, seconds = 0, 0.0
    for place in range(count):
        group = bind(plan, number, place * len(groups) // count, tuple(sinks))
        blocks: Mapping[int, Any] = {}
        try:
            for _, stage in group.stages:
                blocks = make_blocks(stage, blocks)
            blocks = make_blocks(group.opened, blocks)
            versions = [item.parts(blocks[n] for n in each) for item, each in zip(group.work, group.blocks, strict=True)]
            done = try_blocks(group.work, versions, SAMPLE_SECONDS / count)
        except (OSError, HeadraceError):  # which `convert` says better
            return 0.0
        made, seconds = made + done[0], seconds + done[1]
    return made / seconds if seconds else 0.0
