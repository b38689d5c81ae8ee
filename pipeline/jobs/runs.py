"""A run: a unit on its way through a fleet, and how it stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.jobs.tasks import Here, There
from pipeline.jobs.units import Unit

State = Literal[
    "queued", "waiting", "running", "done", "up_to_date", "refused", "unsettled", "failed", "no engine", "crashed", "cancelled",
    "interrupted", "split",
]  # fmt: skip
ACTIVE: tuple[State, ...] = ("queued", "waiting", "running")
GOOD: tuple[State, ...] = ("done", "up_to_date", "unsettled")
CODES: Mapping[int, State] = {0: "done", 2: "refused", 3: "failed", 4: "no engine"}


@dataclass
class Run:
    """A unit on its way: what has been tried, and how it ended. Times in seconds since 1970.

    `state`: waiting is for the next attempt, split for one of several jobs that were made runs of their own (`parts`). `progress`:
    the last that its process said. `attempts`: what each attempt at a step returned.
    """

    number: int
    unit: Unit
    cause: str
    state: State = "queued"
    error: str = ""
    exit_code: int | None = None
    queued: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    not_before: float = 0.0
    step: int = 0
    failures: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    progress: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)
    moved: float = 0.0  # when it last wrote, by time.monotonic()
    stalled: bool = False
    cancelled: bool = False
    parts: list[int] = field(default_factory=list)
    task: There | Here | None = None

    @property
    def log(self) -> list[str]:
        """The last lines of its processes that are no events."""
        return [line for each in self.attempts for line in each.get("tail", ())]

    def total(self, figure: str) -> float:
        """The sum of a figure over its attempts, such as seconds or bytes_written."""
        return sum(each.get(figure) or 0 for each in self.attempts)

    def as_json(self) -> dict[str, Any]:
        """As plain values: sizes in bytes, times in seconds. `seconds`, `bytes_read` and `bytes_written` are of all attempts."""
        said, unit = self.progress, self.unit
        return {
            "number": self.number, "name": unit.name, "source": unit.source, "outputs": list(unit.outputs), "cause": self.cause,
            "state": self.state, "queued": self.queued, "started": self.started, "ended": self.ended,
            "attempts": len(self.attempts), "exit_code": self.exit_code, "error": self.error,
            "bytes_done": said.get("bytes", 0), "bytes_total": said.get("total_bytes", 0),
            "seconds": round(self.total("seconds"), 3), "bytes_read": int(self.total("bytes_read")),
            "bytes_written": int(self.total("bytes_written")),
            "peak_memory_bytes": max((each.get("peak_memory_bytes") or 0 for each in self.attempts), default=0),
            **{name: self.place.get(name, "") for name in ("host", "page", "dashboard")},
        }  # fmt: skip


# Called with queued, started, progress, stalled, retried or ended, the run, and what there is to say.
Listener = Callable[[str, Run, Mapping[str, Any]], None]
