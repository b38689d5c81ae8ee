"""The state of a run so far, kept for those that watch it: a page, Prometheus, a store of jobs.

A RunWatch is told of each finished task (one to several hundred megabytes) and adds up its figures; it does no work for the pieces
inside a task. The figures that cost more (progress by rank, throughput, memory) are worked out when somebody asks for a snapshot.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.tensor.metering import stage_bytes
from pipeline.tensor.process import memory_bytes, peak_memory_bytes
from pipeline.watching.layers import LayerProgress
from pipeline.watching.nodes import LiveEngine, LiveNode, StageProgress
from pipeline.watching.rank_sizes import rank_sizes, shown_names

if TYPE_CHECKING:
    from pipeline.calibration.layer_task import LayerDone
    from pipeline.planning.bind import BoundGroup, Inputs
    from pipeline.planning.build_steps import BuildStep
    from pipeline.planning.plans import Plan
    from stages.write import Written

SAMPLE_SECONDS = 1.0  # the least time between two samples
MAX_SAMPLES = 600  # beyond this, every other sample is dropped
RECENT_SECONDS = 30.0  # the time span from which the throughput and the time left are estimated

Outcome = Literal["done", "failed", "interrupted"]
State = Literal["starting", "running"] | Outcome
ENDED = ("done", "failed", "interrupted")


@dataclass(frozen=True)
class Share:
    """The progress of one rank file of one target, in bytes. `target`: the name that its directory is shown by."""

    target: str
    rank: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Sample:
    """The bytes written `seconds` after the start of a run, and the memory that its process held then."""

    seconds: float
    done_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. Sizes are in bytes, times in seconds.

    `done_bytes` of `total_bytes` are written, into rank files and to scratch. `bytes_read` of the source and `bytes_written` into
    rank files are this run's; those of scratch are apart. `stages`: bytes and seconds by stage, summed over workers.
    `resumed_bytes`: what an earlier run had written. `eta_seconds` and `bytes_per_second` are None until they can be estimated.
    `idle_seconds`: time since the last task ended. `memory_bytes` is -1 where the system does not report it.
    `layer`: the tensor that was written last. `nodes`, `edges`: the graph of stages of what this run does, of `graph_tasks` tasks.
    `whole`: the shown names of the outputs that it has made whole. `engines`: those that it builds. `calibrated_layers` of
    `layers` of the model are calibrated, and `layer_part` of the next one, from 0 to 1; all are 0 where nothing is measured.
    `dashboard`: as listeners get it.
    """

    name: str = ""
    source: str = ""
    source_kind: str = ""
    source_bytes: int = 0
    outputs: tuple[str, ...] = ()
    scheduler: str = ""
    dashboard: str = ""
    state: State = "starting"
    layer: str = ""
    phase: str = ""
    phases: tuple[str, ...] = ()
    tasks: int = 0
    done_tasks: int = 0
    total_bytes: int = 0
    done_bytes: int = 0
    resumed_bytes: int = 0
    bytes_read: int = 0
    scratch_bytes_read: int = 0
    bytes_written: int = 0
    scratch_bytes_written: int = 0
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
    nodes: tuple[LiveNode, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    graph_tasks: int = 0
    whole: tuple[str, ...] = ()
    engines: tuple[LiveEngine, ...] = ()
    calibrated_layers: int = 0
    layers: int = 0
    layer_part: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def summary(self) -> dict[str, Any]:
        """Return the snapshot as plain values, for JSON."""
        return asdict(self)


class RunWatch:
    """A listener of a run (see `pipeline.watching.listener`) that gives snapshots of it to any thread.

    `stages`: seconds and bytes by stage, summed over workers. `bytes_read`, `scratch_bytes_read`: bytes of the source and of
    scratch that tasks which have ended have read, each byte once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns monotonic seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._plan: Plan | None = None
        self._state: State = "starting"
        self._begun = self._last = clock()
        self._tasks = self._done_tasks = self._total = self._done = self._resumed = 0
        self.bytes_read = self.scratch_bytes_read = 0
        self._inputs: Mapping[int, Inputs] = {}
        self._seen: set[Any] = set()
        self.stages: dict[str, dict[str, float]] = {}
        self._phase = ""
        self._ranks: dict[tuple[int, int], int] = {}
        self._samples: deque[Sample] = deque()
        self._ended: float | None = None
        self._shares: tuple[tuple[tuple[int, int], str, int], ...] | None = None
        self._sinks: tuple[int, ...] = ()
        self._progress = StageProgress()
        self._whole: list[int] = []
        self._dashboard = self._layer = ""
        self._layers = LayerProgress()

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        with self._lock:
            self._plan, self._state, self._phase = plan, "running", plan.phases[0].name
            self._dashboard = dashboard
            self._tasks, self._done_tasks = plan.tasks, done_tasks
            self._total, self._done, self._resumed = total_bytes, done_bytes, done_bytes
            self._begun = self._last = self._clock()
            self._sample()

    def entered(
        self, sinks: tuple[int, ...], written: Mapping[tuple[int, int], int], inputs: Mapping[int, Inputs] | None = None
    ) -> None:
        """Note which outputs are written.

        Parameters
        ----------
        sinks
            The indices of the outputs among the sinks of the plan's last phase.
        written
            The bytes that an earlier run has written, by (position in `sinks`, rank).
        inputs
            What each group that is left to do reads, by its number.
        """
        with self._lock:
            self._inputs = inputs or {}
            self._sinks, self._ranks, self._shares = sinks, dict(written), None

    def bound(self, groups: Iterable[BoundGroup], builds: Sequence[BuildStep] = (), layers: int = 0) -> None:
        """Note the groups that this run does, after which outputs it writes: they say which stages there are, and their tasks.

        `builds`: the engines that it builds. `layers`: those that it calibrates.
        """
        with self._lock:
            self._progress = StageProgress(groups, len(self._sinks), builds, layers)
            if layers and self._plan and self._plan.calibrating:
                whole = self._plan.calibrating
                self._layers = LayerProgress(layers, whole.layers, whole.plan.activations, self._clock())
            else:
                self._layers = LayerProgress(layers, now=self._clock())

    def calibrated(self, done: LayerDone) -> None:
        """Note that a layer is calibrated."""
        with self._lock:
            self._last = self._clock()
            self._progress.calibrated(done.metrics)
            self._layers.advanced(done.seconds, self._last)
            self._add(done.metrics)
            self._sample()

    @property
    def calibration_seconds_left(self) -> float | None:
        """How long the layers that are left to calibrate may take; None where nothing tells."""
        return self._layers.seconds_left(self._clock())

    def _add(self, metrics: Mapping[tuple[str, str], float]) -> None:
        for (stage, unit), value in metrics.items():
            totals = self.stages.setdefault(stage, {})
            totals[unit] = totals.get(unit, 0.0) + value

    def built(self, name: str, seconds: float, failed: bool) -> None:
        """Note that a build has ended, by its step's name."""
        with self._lock:
            self._last = self._clock()
            self._progress.built(name, seconds, failed)

    def whole(self, sink: int) -> None:
        """Note that an output is whole; `sink` is its index among the sinks of the plan's last phase."""
        with self._lock:
            self._whole.append(sink)
            self._progress.whole()

    def advanced(self, written: Written) -> None:
        with self._lock:
            self._last = self._clock()
            self._done += written.bytes_written
            self._done_tasks += 1
            self._layer = written.name
            self._progress.advanced(written)
            self._count(written.number)
            self._add(written.metrics)
            if self._plan:
                phases = self._plan.phases
                self._phase = next(phase.name for n, phase in enumerate(phases) if written.number < self._plan.first_group(n + 1))
            for part in written.checksums:
                if part.chunk:  # of scratch
                    continue
                key = part.sink, part.rank
                self._ranks[key] = self._ranks.get(key, 0) + part.nbytes
            self._sample()

    def _count(self, number: int) -> None:
        """Count what a group reads that no other has read before."""
        inputs = self._inputs.get(number)
        if inputs:
            self.bytes_read += sum(nbytes for key, nbytes in inputs.source.items() if key not in self._seen)
            self.scratch_bytes_read += sum(nbytes for key, nbytes in inputs.scratch.items() if key not in self._seen)
            self._seen.update(inputs.source, inputs.scratch)

    def finished(self) -> None:
        """Note that the run is over, for those who were not told how it ended."""
        built = all(engine.done_tasks == engine.tasks and not engine.failed for engine in self._progress.engines())
        self.end("done" if self._plan is not None and self._done >= self._total and built else "failed")

    def end(self, outcome: Outcome) -> None:
        """Note how the run ended; what is said first stays."""
        with self._lock:
            if self._state not in ENDED:
                self._state, self._ended = outcome, self._clock()
                self._sample(force=True)

    @property
    def has_ended(self) -> bool:
        return self._state in ENDED

    def snapshot(self) -> Snapshot:
        """Return the state of the run now."""
        with self._lock:
            plan = self._plan
            if plan is None:
                return Snapshot(state=self._state, memory_bytes=memory_bytes())
            if self._ended is None:
                self._sample()
            now = self._clock() if self._ended is None else self._ended
            rate = self._rate(now - self._begun)
            left = self._total - self._done
            eta = None if self._ended is not None else left / rate if rate else None
            if self._layers.left and self._ended is None:  # bytes come as layers do
                self._last = now if self._layers.look() else self._last
                eta = self._layers.seconds_left(now)
            outputs = tuple(str(target.output.directory) for target in plan.targets)
            return Snapshot(
                name=", ".join(Path(path).name for path in outputs),
                source=plan.source.place,
                source_kind=plan.source.kind,
                source_bytes=plan.source.nbytes,
                outputs=outputs,
                scheduler=plan.job.scheduler,
                dashboard=self._dashboard,
                layer=self._layer,
                state=self._state,
                phase=self._phase,
                phases=tuple(phase.name for phase in plan.phases),
                tasks=self._tasks,
                done_tasks=self._done_tasks,
                total_bytes=self._total,
                done_bytes=self._done,
                resumed_bytes=self._resumed,
                bytes_read=self.bytes_read,
                scratch_bytes_read=self.scratch_bytes_read,
                bytes_written=stage_bytes(self.stages, "write"),
                scratch_bytes_written=stage_bytes(self.stages, "write_scratch"),
                seconds=now - self._begun,
                idle_seconds=now - self._last,
                bytes_per_second=rate,
                eta_seconds=0.0 if left <= 0 else eta,
                memory_bytes=self._samples[-1].memory_bytes,
                peak_memory_bytes=peak_memory_bytes(),
                memory_limit_bytes=int(plan.budget.limit_bytes),
                stages={stage: dict(totals) for stage, totals in self.stages.items()},
                ranks=self._filled(plan),
                samples=tuple(self._samples),
                nodes=self._progress.nodes(),
                edges=self._progress.edges,
                graph_tasks=self._progress.graph_tasks,
                whole=tuple(shown_names(plan, self._sinks)[sink] for sink in self._whole),
                engines=self._progress.engines(),
                calibrated_layers=self._layers.done,
                layers=self._layers.layers,
                layer_part=self._layers.part,
            )

    def _sample(self, force: bool = False) -> None:
        seconds = self._clock() - self._begun
        if self._samples and seconds - self._samples[-1].seconds < SAMPLE_SECONDS and not force:
            return
        self._samples.append(Sample(seconds, self._done, memory_bytes()))
        if len(self._samples) > MAX_SAMPLES:
            self._samples = deque(list(self._samples)[::2])

    def _rate(self, now: float) -> float | None:
        """Return bytes per second over the last RECENT_SECONDS, or since the start of a shorter run or of one that has ended.

        None at its very start. `now`: seconds since the start.
        """
        if self._ended is not None:
            return (self._done - self._resumed) / now if now > 0 else None
        old = (sample for sample in reversed(self._samples) if now - sample.seconds >= RECENT_SECONDS)
        since = next(old, self._samples[0])
        return (self._done - since.done_bytes) / (now - since.seconds) if now > since.seconds else None

    def _filled(self, plan: Plan) -> tuple[Share, ...]:
        if self._shares is None:
            self._shares = tuple(rank_sizes(plan, self._sinks))
        return tuple(Share(target, key[1], min(self._ranks.get(key, 0), total), total) for key, target, total in self._shares)
