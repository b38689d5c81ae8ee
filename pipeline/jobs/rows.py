"""Jobs, runs and attempts as the store gives them: frozen values, times in seconds since 1970, sizes in bytes.

    job       a conversion that was asked for: its options and the directories that it writes. Asked for again, it is the same job.
    run       one occasion on which it is to be done: a batch, a trigger that fired, a retry by hand.
    attempt   one process that did it: a run has several where some failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.jobs.events import Outcome

# queued -> running -> one of the ends; running -> waiting (for the next attempt) -> running; running -> queued (the daemon stopped).
State = Literal[
    "queued", "waiting", "running", "done", "up_to_date", "refused", "failed", "crashed", "cancelled", "interrupted", "split"
]
ACTIVE: tuple[State, ...] = ("queued", "waiting", "running")
GOOD: tuple[State, ...] = ("done", "up_to_date")
BAD: tuple[State, ...] = ("refused", "failed", "crashed", "interrupted")


@dataclass(frozen=True)
class JobRow:
    """A job. `state`, `run`, `error` and `updated` are those of its latest run; `options` are a Job's fields as plain values."""

    id: int
    name: str
    source: str
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    created: float
    state: State
    run: int
    updated: float
    error: str


@dataclass(frozen=True)
class RunRow:
    """A run. `cause`: batch, retry, or a trigger's name; `queue`: serve, or the batch that it belongs to.

    `attempts` made so far; `not_before`: when the next may begin. `peak_memory_bytes`, `bytes_to_write`: as planned.
    `bytes_done` of `bytes_total` are written. `scratch`: the places of the cuts that it may leave.
    """

    id: int
    job: int
    name: str
    outputs: tuple[str, ...]
    state: State
    cause: str
    queue: str
    queued: float
    started: float | None
    ended: float | None
    not_before: float
    attempts: int
    exit_code: int | None
    error: str
    bytes_done: int
    bytes_total: int
    bytes_to_write: int
    peak_memory_bytes: int
    scratch: tuple[str, ...]
    cancel_requested: bool


@dataclass(frozen=True)
class AttemptRow:
    """An attempt. `outcome` is None while it runs; `pid` and `birth` name its process for as long as the machine is up."""

    id: int
    run: int
    number: int
    worker: str
    pid: int | None
    birth: str
    started: float
    ended: float | None
    outcome: Outcome | Literal["lost"] | None
    exit_code: int | None
    error: str
    seconds: float | None
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    by_stage: Mapping[str, Mapping[str, float]]
