"""Jobs, runs and attempts as the store gives them: frozen values, times in seconds since 1970, sizes in bytes.

job       a conversion that was asked for: its options and the directories that it writes. Asked for again, it is the same job.
run       one occasion on which it is to be done: a batch, a trigger that fired, a retry by hand.
attempt   one process that did it: a run has several where some failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.jobs.events import Outcome

State = Literal[
    "queued", "waiting", "running", "done", "up_to_date", "refused", "failed", "crashed", "cancelled", "interrupted", "split"
]
# Which states a run may come from: those that are no key are ends, or are only entered as the run is made.
BEFORE: Mapping[State, tuple[State, ...]] = {
    "running": ("queued", "waiting"),
    "waiting": ("running",),  # for the next attempt
    "queued": ("running", "waiting"),  # the daemon stopped, or lost it
    "done": ("running",),
    "up_to_date": ("running",),
    "refused": ("running",),
    "failed": ("running",),
    "crashed": ("running",),
    "split": ("running",),  # a conversion of several jobs was refused; each is a run of its own now
    "interrupted": ("queued", "waiting", "running"),
    "cancelled": ("queued", "waiting", "running"),
}
STATES: tuple[State, ...] = get_args(State)
ACTIVE: tuple[State, ...] = ("queued", "waiting", "running")
GOOD: tuple[State, ...] = ("done", "up_to_date")
BAD: tuple[State, ...] = ("refused", "failed", "crashed", "interrupted")


@dataclass(frozen=True)
class Conversion:
    """A conversion as it is given to the store: a source and the directories to write.

    `options` are a Job's fields as plain values. As planned: `peak_memory_bytes`, `room` (bytes needed, by directory) and `scratch`
    (the places of cuts). `resources` are what no two attempts may hold at the same time: the outputs, and scratch that is shared.
    `parts`: the jobs that were made one, where there are several: their names, and how many of the targets are theirs, in order.
    """

    name: str
    source: str
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    resources: tuple[str, ...]
    room: Mapping[str, int]
    peak_memory_bytes: int
    scratch: tuple[str, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()

    def split(self) -> list[Conversion]:
        """The conversions of its parts, one by one; itself where it has none."""
        if not self.parts:
            return [self]
        shared = {key: value for key, value in self.options.items() if key != "target"}
        targets, real = list(self.options["target"]), list(self.resources)
        result = []
        for name, count in self.parts:
            mine, targets = targets[:count], targets[count:]
            resources, real = real[:count], real[count:]
            outputs = tuple(str(target["output_dir"]) for target in mine)
            options = {**shared, **mine[0]} if count == 1 else {**shared, "target": mine}
            room = {place: nbytes for place, nbytes in self.room.items() if place in outputs}
            result.append(Conversion(name, self.source, outputs, options, tuple(resources), room, self.peak_memory_bytes))
        return result


@dataclass(frozen=True)
class Unit:
    """A conversion to be done for the jobs named in `members`, or why it will not be: an `error`, or it is `up_to_date`.

    `parts`: the conversions of the members one by one, where there are several. `shared`: the cut that others read too, or "".
    """

    conversion: Conversion
    members: tuple[str, ...]
    up_to_date: bool = False
    error: str = ""
    parts: tuple[Unit, ...] = ()
    shared: str = ""


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
    """A run, with what Conversion says. `cause`: batch, retry, or a trigger's name; `queue`: serve, or a batch by its worker.

    `attempts` made so far, of which `failures` count against it; `not_before`: when the next may begin. `bytes_done` of
    `bytes_total` are written.
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
    failures: int
    exit_code: int | None
    error: str
    bytes_done: int
    bytes_total: int
    peak_memory_bytes: int
    room: Mapping[str, int]
    scratch: tuple[str, ...]
    resources: tuple[str, ...]
    parts: tuple[tuple[str, int], ...]
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


@dataclass(frozen=True)
class WorkerRow:
    """A process that does runs: a batch, or the daemon. `ended` is None where it runs, or was killed and nobody has noticed yet."""

    id: str
    kind: Literal["batch", "serve"]
    pid: int
    birth: str
    started: float
    heartbeat: float
    ended: float | None
