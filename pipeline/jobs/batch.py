"""A batch: everything that was asked for, one conversion after another or some at a time, and what came of each."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.jobs.events import Hub
from pipeline.jobs.limits import Limits
from pipeline.jobs.retry import Retry
from pipeline.jobs.rows import GOOD, RunRow, Unit
from pipeline.jobs.runner import Runner
from pipeline.jobs.store import JobStore
from pipeline.jobs.submit import submit

# Exit codes, the worst last: what running it again may mend, what is not as it should be, what somebody must mend, a bug.
_WORSE = (0, 3, 5, 2, 1)


@dataclass(frozen=True)
class BatchEntry:
    """The result of one job of a batch, and the number of its run in the store."""

    name: str
    outputs: tuple[str, ...]
    outcome: str
    exit_code: int
    run: int
    error: str


@dataclass(frozen=True)
class Summary:
    """The results of a batch: of the jobs as they were asked for, and of the conversions that were made for them."""

    jobs: tuple[BatchEntry, ...]
    conversions: tuple[dict[str, Any], ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 where all is well, else the worst of all jobs."""
        return max((entry.exit_code for entry in self.jobs), key=_WORSE.index, default=0)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            "counts": dict(Counter(entry.outcome for entry in self.jobs)),
            "jobs": [asdict(entry) for entry in self.jobs],
            "conversions": list(self.conversions),
        }


class Batch:
    """Units to be done, in a queue of their own."""

    def __init__(self, store: JobStore, hub: Hub, units: Sequence[Unit], limits: Limits, retry: Retry | None = None) -> None:
        self.store, self.hub, self.units = store, hub, units
        self.queue = store.register("batch").id
        self.runner = Runner(store, hub, self.queue, self.queue, limits, retry)

    def run(self, stop: threading.Event | None = None) -> Summary:
        """Do what is not done of them, in this thread; go on past what fails. `stop` ends it in order."""
        started = time.monotonic()
        try:
            runs = submit(self.store, self.hub, self.units, self.queue, "batch")
            self.runner.work(stop or threading.Event(), until_idle=True)
        finally:
            self.store.interrupt(self.queue, "the batch was stopped before it began")
            self.store.end_worker(self.queue)
        return _summary(self.store, self.queue, self.units, runs, time.monotonic() - started)


def _summary(store: JobStore, queue: str, units: Sequence[Unit], runs: Sequence[RunRow], seconds: float) -> Summary:
    by_outputs = {run.outputs: run for run in reversed(store.runs(queue=queue, limit=None))}
    entries = []
    for unit, before in zip(units, runs, strict=True):
        run = store.run(before.id)
        for part in unit.parts or (unit,):
            own = by_outputs.get(part.conversion.outputs, run) if run.state == "split" else run
            outcome = "up_to_date" if part.up_to_date and own.state == "done" else own.state
            code = 0 if own.state in GOOD else own.exit_code or 3
            entries.append(BatchEntry(part.members[0], part.conversion.outputs, outcome, code, own.id, own.error))
    conversions = tuple(_figures(store, run) for run in sorted(by_outputs.values(), key=lambda run: run.id))
    return Summary(tuple(entries), conversions, seconds)


def _figures(store: JobStore, run: RunRow) -> dict[str, Any]:
    attempts = store.attempts(run.id)
    return {
        "run": run.id,
        "job": run.job,
        "name": run.name,
        "outputs": list(run.outputs),
        "outcome": run.state,
        "exit_code": run.exit_code,
        "error": run.error,
        "attempts": len(attempts),
        "seconds": round(sum(attempt.seconds or 0.0 for attempt in attempts), 3),
        "bytes_read": sum(attempt.bytes_read for attempt in attempts),
        "bytes_written": sum(attempt.bytes_written for attempt in attempts),
        "peak_memory_bytes": max((attempt.peak_memory_bytes for attempt in attempts), default=0),
    }
