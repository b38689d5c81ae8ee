"""All jobs at one moment, for the daemon's page and for Prometheus: what the hub has told since it began, beside the store."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pipeline.jobs.events import Event, JobFinished, JobStarted, Progress, Stalled
from pipeline.jobs.reading import Reader
from pipeline.jobs.rows import RunRow
from pipeline.watching.metrics import Durations, Reading, Running
from pipeline.watching.state import MAX_SAMPLES, Sample, Share

SAMPLE_SECONDS = 5.0  # between two samples: conversions tell of themselves every few seconds
SHOWN = 50  # jobs, and failures, on a page
FORGET_SECONDS = 60.0  # after which a conversion that the store knows nothing of is none


@dataclass(frozen=True)
class Live:
    """A conversion at work: its last progress, and when its bytes last grew, by time.monotonic()."""

    job: int
    name: str
    moved: float
    progress: Progress | None = None


@dataclass(frozen=True)
class Overview:
    """Everything that a page shows. `samples`: bytes written by all jobs since the daemon began, and the memory that they held.

    `active`: runs that work, then those that wait; `failures`: those that ended badly last. Each newest first, and not all of many.
    """

    reading: Reading
    active: tuple[RunRow, ...]
    live: Mapping[int, Live]
    failures: tuple[RunRow, ...]
    samples: tuple[Sample, ...]
    seconds: float


@dataclass
class _Counters:
    """Totals over the attempts that have ended, and the number of stalls: they never decrease."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stalls: int = 0
    durations: dict[str, Durations] = field(default_factory=dict)


class Overseer:
    """Listens to a hub, and gives an Overview whenever one is asked for, from any thread."""

    def __init__(self, store: Reader, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._store, self._clock = store, clock
        self._begun = clock()
        self._lock = threading.Lock()
        self._live: dict[int, Live] = {}
        self._counters = _Counters()
        self._samples: deque[Sample] = deque([Sample(0.0, 0, 0)])

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        with self._lock:
            if isinstance(event, JobStarted):
                self._live[event.run] = Live(event.job, event.name, self._clock())
            elif isinstance(event, Progress):
                before = self._live.get(event.run)
                grown = before is None or before.progress is None or event.bytes > before.progress.bytes
                self._live[event.run] = Live(
                    event.job, event.name, self._clock() if grown or before is None else before.moved, event
                )
            elif isinstance(event, Stalled):
                self._counters.stalls += 1
            elif isinstance(event, JobFinished):
                self._live.pop(event.run, None)
                _add(self._counters.stages, event.by_stage)
                if event.attempt:  # 0: refused or up to date before any was made
                    took = self._counters.durations.get(event.outcome, Durations())
                    self._counters.durations[event.outcome] = took.plus(event.seconds)
            self._sample()

    def look(self) -> Overview:
        """Everything, as it is now."""
        counts = self._store.counts_by_state()
        running = self._store.runs(states=("running",), limit=None)
        active = [*running, *self._store.runs(states=("waiting", "queued"), limit=SHOWN)]
        failures = self._store.recent_failures(SHOWN)
        with self._lock:
            now = self._clock()
            self._forget({run.id for run in running}, now)
            self._sample()
            reading = Reading(
                stages=self._stages(),
                states={str(state): count for state, count in counts.items()},
                queue_length=counts["queued"] + counts["waiting"],
                stalls=self._counters.stalls,
                durations=dict(self._counters.durations),
                running=tuple(_running(live, now) for live in self._live.values()),
            )
            samples = tuple(self._samples)
            return Overview(reading, tuple(active), dict(self._live), tuple(failures), samples, now - self._begun)

    def _forget(self, running: set[int], now: float) -> None:
        """Drop what another process has taken over: its end is told there."""
        for run, live in list(self._live.items()):
            if run not in running and now - live.moved > FORGET_SECONDS:
                _add(self._counters.stages, live.progress.by_stage if live.progress else {})
                del self._live[run]

    def _stages(self) -> dict[str, dict[str, float]]:
        """Seconds and bytes by stage, of attempts that have ended and of those at work."""
        totals = {stage: dict(units) for stage, units in self._counters.stages.items()}
        for live in self._live.values():
            _add(totals, live.progress.by_stage if live.progress else {})
        return totals

    def _sample(self) -> None:
        seconds = self._clock() - self._begun
        if seconds - self._samples[-1].seconds < SAMPLE_SECONDS:
            return
        held = sum(max(live.progress.memory_bytes, 0) for live in self._live.values() if live.progress)
        written = int(self._stages().get("write", {}).get("bytes", 0))
        self._samples.append(Sample(seconds, written, held))
        if len(self._samples) > MAX_SAMPLES:
            self._samples = deque(list(self._samples)[::2])


def _add(totals: dict[str, dict[str, float]], stages: Mapping[str, Mapping[str, float]]) -> None:
    """Add seconds and bytes by stage."""
    for stage, units in stages.items():
        mine = totals.setdefault(stage, {})
        for unit, value in units.items():
            mine[unit] = mine.get(unit, 0.0) + value


def _running(live: Live, now: float) -> Running:
    last = live.progress
    name = f"{live.job} {live.name}"  # names alone may be those of several
    if last is None:
        return Running(name, 0, 0, now - live.moved)
    return Running(
        name=name,
        done_bytes=last.bytes,
        total_bytes=last.total_bytes,
        idle_seconds=now - live.moved,
        bytes_per_second=last.bytes_per_second,
        eta_seconds=last.eta_seconds,
        memory_bytes=last.memory_bytes if last.memory_bytes >= 0 else None,
        memory_limit_bytes=last.memory_limit_bytes or None,
        tasks=last.tasks,
        done_tasks=last.done_tasks,
        ranks=tuple(Share(*rank) for rank in last.ranks),
    )
