"""Decides when a conversion that failed is tried again: after longer and longer waits, and never for bad input or a bug."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.jobs.files import Table


class Retry(Table):
    """How often, and after how long: first_seconds, and factor times longer each time, at most longest_seconds."""

    attempts: Annotated[int, Field(ge=1, description="Attempts in all; 1: none is repeated.")] = 4
    first_seconds: Annotated[float, Field(ge=0)] = 10.0
    factor: Annotated[float, Field(ge=1)] = 3.0
    longest_seconds: Annotated[float, Field(ge=0)] = 600.0

    def delay(self, outcome: str, failures: int, passing: bool) -> float | None:
        """Seconds to wait after the failure of that number, from 1; None where it is not tried again.

        Tried again is what failed (the disk or the network, a signal from somewhere, a worker that was lost) and what was refused
        for a reason that may pass: another job at work in the same place, or a disk without room.
        """
        if failures >= self.attempts or not (outcome == "failed" or (outcome == "refused" and passing)):
            return None
        return min(self.longest_seconds, self.first_seconds * self.factor ** min(failures - 1, 50))
