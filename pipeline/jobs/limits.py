"""How many conversions run at a time: as memory, disks and the user allow. One always does."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pipeline.jobs.process import machine_memory
from pipeline.jobs.rows import RunRow
from pipeline.sinks.output_checks import check_space

THREADS = 8  # that one conversion keeps busy, at most


@dataclass(frozen=True)
class Limits:
    """At most `max_jobs` conversions, whose projected peaks add up to `max_memory` bytes at most."""

    max_jobs: int
    max_memory: int

    @classmethod
    def of(cls, max_jobs: int | None, max_memory: int | None) -> Limits:
        """The user's limits; for None, a conversion for every eight cores and four fifths of the machine's memory."""
        cores = os.cpu_count() or 1
        return cls(max_jobs or max(cores // THREADS, 1), max_memory or machine_memory() * 4 // 5)

    def allow(self, run: RunRow, running: Collection[RunRow]) -> bool:
        """Whether a run may begin beside others: there is room on the disks for all that they will write, too."""
        if not running:
            return True
        if len(running) >= self.max_jobs:
            return False
        if sum(each.peak_memory_bytes for each in (run, *running)) > self.max_memory:
            return False
        return not check_space({Path(place): nbytes for each in (*running, run) for place, nbytes in each.room.items()})
