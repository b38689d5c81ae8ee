"""The events of jobs, and the hub that passes them on to its subscribers.

An event is published in the process that does the work (`headrace batch` or `headrace serve`), after the store has recorded it.
Another process learns the same from the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["done", "up_to_date", "refused", "failed", "crashed", "cancelled", "interrupted", "split"]


@dataclass(frozen=True)
class Event:
    """The fields of every event: its time (seconds since 1970), the numbers of job and run in the store, and the job's name."""

    time: float
    job: int
    run: int
    name: str


@dataclass(frozen=True)
class JobQueued(Event):
    """A run waits to be done. `cause`: batch, retry, or the name of the trigger that queued it."""

    outputs: tuple[str, ...]
    cause: str


@dataclass(frozen=True)
class JobStarted(Event):
    """A process of its own, `pid`, began to convert; `attempt` counts from 1 within the run."""

    outputs: tuple[str, ...]
    attempt: int
    pid: int


@dataclass(frozen=True)
class Progress(Event):
    """How far a conversion is. `bytes` of `total_bytes` are written, those of earlier attempts included.

    `by_stage`: seconds and bytes of read, unpack, write and the others so far, summed over workers: {"read": {"seconds": 1.2}}.
    `ranks`: (target, rank, bytes written, bytes in all) of each rank file, none before the last phase. `memory_bytes` are held by
    its process, -1 where the system does not say.
    """

    attempt: int
    bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float
    layer: str
    by_stage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tasks: int = 0
    done_tasks: int = 0
    memory_bytes: int = -1
    memory_limit_bytes: int = 0
    ranks: tuple[tuple[str, int, int, int], ...] = ()


@dataclass(frozen=True)
class JobFinished(Event):
    """An attempt ended.

    `outcome` is done or up_to_date where all is well; refused (bad input, exit code 2), failed (exit code 3, or a signal), crashed
    (a bug, exit code 1), cancelled, interrupted by the end of the daemon, or split: a conversion of several jobs was refused, and
    each of them is queued as one of its own. `error` is the report of what was wrong, "" for none.
    `retry_seconds`: after how long it will be tried again, None for never: then the outcome is the run's.
    `seconds`: of this attempt. `bytes` were written, `bytes_read` read, with `peak_memory_bytes` as the process itself measured.
    """

    outputs: tuple[str, ...]
    attempt: int
    outcome: Outcome
    exit_code: int
    seconds: float
    bytes: int
    bytes_read: int
    peak_memory_bytes: int
    error: str = ""
    retry_seconds: float | None = None
    by_stage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stalled(Event):
    """A conversion has written nothing for `seconds`. Published once until it moves again."""

    attempt: int
    seconds: float
    bytes: int
    total_bytes: int


Listener = Callable[[Event], None]


class Hub:
    """Tells every subscriber of every event, in the order of publishing, in the publisher's thread.

    A subscriber that fails is logged and harms neither the others nor the work; a slow one should hand over to a thread of its own.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._lock = threading.RLock()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called with each event from now on; returns what ends that."""
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Tell everyone."""
        with self._lock:
            for listener in list(self._listeners):
                try:
                    listener(event)
                except Exception:
                    logging.getLogger(__name__).exception("a listener failed on %s", event)
