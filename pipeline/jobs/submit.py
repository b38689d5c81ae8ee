"""Puts units into a queue of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.jobs.events import Hub, JobFinished
from pipeline.jobs.rows import ACTIVE, GOOD, RunRow, Unit
from pipeline.jobs.store import JobStore


def submit(store: JobStore, hub: Hub, units: Sequence[Unit], queue: str, cause: str, repeat: bool = True) -> list[RunRow]:
    """Queue what is to be done; record what is refused or up to date as the run that it would have been. One row a unit.

    Without `repeat`, as for a trigger that finds the same every minute, what ended the same the last time is not recorded again.
    """
    result = []
    for unit in units:
        if not (unit.error or unit.up_to_date):
            result.append(store.enqueue(unit.conversion, queue, cause)[0])
            continue
        ended: Literal["refused", "up_to_date"] = "refused" if unit.error else "up_to_date"
        before = None if repeat else store.latest(unit.conversion)
        as_before = ACTIVE if unit.error else (*ACTIVE, *GOOD)
        if before and (before.state in as_before or (before.state, before.error) == (ended, unit.error)):
            result.append(before)
            continue
        code = 2 if unit.error else 0
        run, _ = store.enqueue(unit.conversion, queue, cause, ended, code, unit.error)
        result.append(run)
        heading = (run.queued, run.job, run.id, run.name)
        hub.publish(JobFinished(*heading, run.outputs, 0, ended, code, 0.0, 0, 0, 0, unit.error))
    return result
