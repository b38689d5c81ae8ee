"""What a run has done so far, kept for whoever watches it: a page, Prometheus, a store of jobs.

A Watch hears of each finished task, which stands for megabytes to hundreds of them, and adds up what it says; nothing is done for
a piece. What costs more (the shares of ranks, throughput, memory) is worked out when somebody looks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.tensor.placement import size
from pipeline.watching.process import memory_bytes, peak_memory_bytes

if TYPE_CHECKING:
    from pipeline.planning.plans import Phase, Plan
    from stages.write import Written

SAMPLE_SECONDS = 1.0  # between two samples
MAX_SAMPLES = 600  # then every other one is forgotten
RECENT_SECONDS = 30.0  # what the throughput and the time left are taken from

State = Literal["starting", "running", "ended"]


@dataclass(frozen=True)
class Share:
    """How far one rank file of one target is, in bytes."""

    target: str
    rank: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Sample:
    """How far a run was `seconds` after its start, and the memory that its process held."""

    seconds: float
    done_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. Sizes in bytes, times in seconds.

    `stages`: bytes and seconds by stage, summed over workers. `resumed_bytes` is what an earlier run had written. `eta_seconds` and
    `bytes_per_second` are None while nothing can be said. `idle_seconds`: since the last task ended. `memory_bytes` is -1 where the
    system does not say.
    """

    name: str = ""
    source: str = ""
    outputs: tuple[str, ...] = ()
    state: State = "starting"
    phase: str = ""
    phases: tuple[str, ...] = ()
    tasks: int = 0
    done_tasks: int = 0
    total_bytes: int = 0
    done_bytes: int = 0
    resumed_bytes: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    idle_seconds: float = 0.0
    bytes_per_second: float | None = None
    eta_seconds: float | None = None
    memory_bytes: int = -1
    peak_memory_bytes: int = 0
    memory_limit_bytes: int = 0
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ranks: tuple[Share, ...] = ()
    samples: tuple[Sample, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


class Watch:
    """A listener of a run (see `pipeline.run.execute.Listener`) that can be looked at from any thread.

    `stages`: seconds and bytes by stage, summed over workers; `bytes_read`: of the source and of scratch.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._state: State = "starting"
        self._begun = self._last = clock()
        self._tasks = self._done_tasks = self._total = self._done = self._resumed = 0
        self.bytes_read = 0
        self.stages: dict[str, dict[str, float]] = {}
        self._phase = ""
        self._ranks: dict[tuple[int, int], int] = {}
        self._samples: deque[Sample] = deque()
        self._shares: tuple[tuple[tuple[int, int], str, int], ...] | None = None
        self._sinks: tuple[int, ...] = ()

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:  # noqa: ARG002
        with self._lock:
            self._plan, self._state = plan, "running"
            self._tasks, self._done_tasks = plan.tasks, done_tasks
            self._total, self._done, self._resumed = total_bytes, done_bytes, done_bytes
            self._begun = self._last = self._clock()
            self._sample()

    def entered(self, phase: Phase, sinks: tuple[int, ...], written: Mapping[tuple[int, int], int]) -> None:
        """A phase begins that writes to the sinks of these numbers.

        `written`: the bytes that an earlier run has written, by the sink's place among them and the rank.
        """
        with self._lock:
            self._phase, self._sinks, self._ranks, self._shares = phase.name, sinks, dict(written), None

    def advanced(self, written: Written) -> None:
        with self._lock:
            self._last = self._clock()
            self._done += written.bytes_written
            self._done_tasks += 1
            self.bytes_read += written.bytes_read
            for (stage, unit), value in written.metrics.items():
                totals = self.stages.setdefault(stage, {})
                totals[unit] = totals.get(unit, 0.0) + value
            for part in written.checksums:
                key = part.sink, part.rank
                self._ranks[key] = self._ranks.get(key, 0) + part.nbytes
            self._sample()

    def finished(self) -> None:
        with self._lock:
            self._state = "ended"
            self._sample(force=True)

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        with self._lock:
            plan = self._plan
            if plan is None:
                return Snapshot(state=self._state, memory_bytes=memory_bytes())
            self._sample()
            now = self._clock()
            rate = self._rate()
            left = self._total - self._done
            outputs = tuple(str(target.output.directory) for target in plan.targets)
            return Snapshot(
                name=", ".join(Path(path).name for path in outputs),
                source=str(plan.source.location),
                outputs=outputs,
                state=self._state,
                phase=self._phase,
                phases=tuple(phase.name for phase in plan.phases),
                tasks=self._tasks,
                done_tasks=self._done_tasks,
                total_bytes=self._total,
                done_bytes=self._done,
                resumed_bytes=self._resumed,
                bytes_read=self.bytes_read,
                seconds=now - self._begun,
                idle_seconds=now - self._last,
                bytes_per_second=rate,
                eta_seconds=0.0 if left <= 0 else left / rate if rate else None,
                memory_bytes=self._samples[-1].memory_bytes,
                peak_memory_bytes=peak_memory_bytes(),
                memory_limit_bytes=int(plan.budget.limit_bytes),
                stages={stage: dict(totals) for stage, totals in self.stages.items()},
                ranks=self._progress(plan),
                samples=tuple(self._samples),
            )

    def _sample(self, force: bool = False) -> None:
        seconds = self._clock() - self._begun
        if self._samples and seconds - self._samples[-1].seconds < SAMPLE_SECONDS and not force:
            return
        self._samples.append(Sample(seconds, self._done, memory_bytes()))
        if len(self._samples) > MAX_SAMPLES:
            self._samples = deque(list(self._samples)[::2])

    def _rate(self) -> float | None:
        """Bytes a second of the last RECENT_SECONDS, or since the start; None before there was time for any."""
        now = self._clock() - self._begun
        old = (sample for sample in reversed(self._samples) if now - sample.seconds >= RECENT_SECONDS)
        since = next(old, self._samples[0])
        return (self._done - since.done_bytes) / (now - since.seconds) if now > since.seconds else None

    def _progress(self, plan: Plan) -> tuple[Share, ...]:
        if self._shares is None:
            self._shares = tuple(_shares(plan, self._phase, self._sinks))
        return tuple(Share(target, key[1], min(self._ranks.get(key, 0), total), total) for key, target, total in self._shares)


def _shares(plan: Plan, phase_name: str, sinks: tuple[int, ...]) -> list[tuple[tuple[int, int], str, int]]:
    """((place of the sink, rank), name of the target, bytes to write) of each rank; none before the last phase."""
    phase = plan.phases[-1]
    if phase.name != phase_name:
        return []
    totals: dict[tuple[int, int], int] = {}
    for store in phase.stores:
        for place, sink in enumerate(sinks):
            itemsize = store.arrays[sink].dtype.itemsize
            for placement in store.placements[sink]:
                if placement.source is not None:
                    key = place, placement.rank
                    totals[key] = totals.get(key, 0) + size(placement.target) * itemsize
    directories = [phase.sinks[sink].directory for sink in sinks]
    names = [directory.name for directory in directories]
    shown = names if len(set(names)) == len(names) else [str(directory) for directory in directories]
    return [(key, shown[key[0]], total) for key, total in sorted(totals.items())]
