"""Run a plan: begin its outputs or take them up again, compute its tasks, finish the outputs. The only module that computes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import BadInput, Interrupted, WriteFailed
from pipeline.planning.listen import parse_listen
from pipeline.planning.plans import Phase, Plan, Sink
from pipeline.run.lower import lower
from pipeline.run.schedulers import Run, Session, run_threads, runner
from pipeline.sinks.journal import Committer, Journal
from pipeline.sinks.reserve import missing
from pipeline.watching.listener import Listener, Silent
from pipeline.watching.process import peak_memory_bytes
from pipeline.watching.state import RunWatch

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Built:
    """An engine that is there. `seconds`: of its builders, summed; 0 where nothing was to do."""

    directory: Path
    seconds: float = 0.0
    nbytes: int = 0
    attempts: int = 0
    up_to_date: bool = False


@dataclass(frozen=True)
class Result:
    """What a conversion did. Sizes in bytes, times in seconds.

    `stages`: seconds and bytes by stage, summed over workers. `phases`: seconds by phase.
    `resumed_tasks`: how many of the plan's tasks an earlier, interrupted run had done. `engines`: what was built after it.
    """

    outputs: tuple[Path, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    stages: Mapping[str, Mapping[str, float]] = field(repr=False)
    phases: Mapping[str, float] = field(repr=False, default_factory=dict)
    up_to_date: bool = False
    resumed_tasks: int = 0
    engines: tuple[Built, ...] = ()


def execute(
    plan: Plan,
    listener: Listener | None = None,
    *,
    started: float | None = None,
    session: Session | None = None,
    watch: RunWatch | None = None,
) -> Result:
    """Do what a plan says. `started` is when the run began, by time.perf_counter(), where planning is to be counted.

    `session`: the scheduler, where one is at hand; else the job's is opened. `watch` is what can be looked at meanwhile, as
    headrace's page does; it hears of each task before the listener.

    Raises BadInput where an output directory is taken or has no room, Interrupted on Ctrl-C or SIGTERM, and WriteFailed where
    the disk or a worker fails; the same plan executed again goes on where this one ended.
    """
    started = time.perf_counter() if started is None else started
    outputs = tuple(path for target in plan.targets for path in target.output.paths)
    if plan.up_to_date and not plan.job.overwrite:
        for cut in plan.scratch:  # a run that was stopped between its last output and this
            cut.release()
        return Result(outputs, 0, 0, time.perf_counter() - started, peak_memory_bytes(), {}, up_to_date=True)
    obstacles = plan.obstacles()
    if obstacles:
        raise BadInput(obstacles)
    listener = listener or Silent()
    run = _Run(plan, listener, started, watch or RunWatch())
    try:
        with nullcontext(session) if session else open_session(plan, run.watch) as (compute, dashboard, _), ExitStack() as stack:
            phases = run.begun = [_begin(phase, plan, stack) for phase in plan.phases]
            run.announce(phases, dashboard)
            for phase in phases:
                run.do(phase, compute)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_places(plan)} is not complete: run the same command again to go on") from None
    except BadInput:
        # Values that no target can hold show when they are read: nothing of the outputs is left then.
        for begun in run.begun:
            begun.abandon()
        raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror or error}{place}; {_places(plan)} is not complete: mend this and run the same command again"
        raise WriteFailed(text) from error
    finally:
        run.watch.finished()
        listener.finished()
    for cut in plan.scratch:
        cut.release()
    seconds = time.perf_counter() - started
    return Result(
        outputs,
        run.watch.bytes_read,
        plan.bytes_written,
        seconds,
        peak_memory_bytes(),
        run.watch.stages,
        run.phases,
        resumed_tasks=run.resumed_tasks,
    )


@dataclass(frozen=True)
class _Begun:
    """A phase under way: the numbers of the sinks it writes to, their journals, and the tasks that are done."""

    phase: Phase
    sinks: tuple[int, ...]
    journals: Mapping[int, Journal]
    done: frozenset[int]
    created: Mapping[int, Path | None]

    def abandon(self) -> None:
        """Remove what the phase has made of sinks that are not whole."""
        for number, journal in self.journals.items():
            if not self.phase.sinks[number].complete:
                self.phase.sinks[number].abandon(journal, self.created[number])

    def written(self) -> dict[tuple[int, int], int]:
        """The bytes of ranks that an earlier run has written: {(place of the sink among `sinks`, rank): bytes}."""
        totals: dict[tuple[int, int], int] = {}
        for place, journal in enumerate(self.journals.values()):
            for entry in journal.entries:
                for rank, _, nbytes, _ in entry["sums"]:
                    totals[place, rank] = totals.get((place, rank), 0) + nbytes
        return totals

    def done_bytes(self) -> int:
        share = self.phase.written_bytes(self.sinks) * len(self.done)
        return share // max(len(self.phase.groups), 1)


def _begin(phase: Phase, plan: Plan, stack: ExitStack) -> _Begun:
    """Begin a phase's sinks; what is begun is undone where a later one cannot be."""
    is_scratch = phase is not plan.phases[-1]
    sinks = tuple(range(len(phase.sinks))) if plan.job.overwrite and not is_scratch else phase.pending
    # A cut is of use only to outputs that are not whole yet.
    journals: dict[int, Journal] = {}
    made: dict[int, Path | None] = {}
    for number in sinks:
        sink = phase.sinks[number]
        created = made[number] = missing(sink.directory)
        journal = sink.begin(len(phase.groups), fresh=plan.job.overwrite and not is_scratch)
        journals[number] = journal
        stack.callback(journal.close)
        if not journal.entries:
            stack.enter_context(_Undo(sink, journal, created))
    done = [frozenset(task for entry in journal.entries for task in entry["done"]) for journal in journals.values()]
    return _Begun(phase, sinks, journals, frozenset.intersection(*done) if done else frozenset(), made)


class _Undo:
    """Undoes the beginning of a sink where the run is refused before it starts: then nothing has been written."""

    def __init__(self, sink: Sink, journal: Journal, created: Path | None) -> None:
        self.sink, self.journal, self.created = sink, journal, created

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, BadInput):
            self.sink.abandon(self.journal, self.created)


class _Run:
    """The totals of a run as its phases are done."""

    def __init__(self, plan: Plan, listener: Listener, started: float, watch: RunWatch) -> None:
        self.plan, self.listener, self.started, self.watch = plan, listener, started, watch
        self.phases: dict[str, float] = {}
        self.resumed_tasks = 0
        self.begun: list[_Begun] = []

    def announce(self, phases: list[_Begun], dashboard: str) -> None:
        total = sum(begun.phase.written_bytes(begun.sinks) for begun in phases)
        self.resumed_tasks = sum(len(begun.done) for begun in phases)
        done = sum(begun.done_bytes() for begun in phases)
        for listener in (self.watch, self.listener):
            listener.started(self.plan, dashboard, total, done, self.resumed_tasks)

    def do(self, begun: _Begun, compute: Run) -> None:
        if not begun.sinks:
            return
        began = time.perf_counter()
        self.watch.entered(begun.phase, begun.sinks, begun.written())
        elsewhere = self.plan.job.elsewhere and not begun.phase.here
        graph = lower(begun.phase, self.plan.budget.piece_bytes, begun.sinks, begun.done, synchronize=elsewhere)
        if begun.phase.here:
            compute = partial(run_threads, workers=self.plan.budget.workers)
        with Committer(dict(enumerate(begun.journals.values()))) as committer:
            for written in compute(graph):
                committer.add(written)
                self.watch.advanced(written)
                self.listener.advanced(written)
        self.phases[begun.phase.name] = time.perf_counter() - began
        timings = {
            "seconds": round(time.perf_counter() - self.started, 3),
            "stages": self.watch.stages,
            "phases": self.phases,
        }
        for number, journal in begun.journals.items():
            begun.phase.sinks[number].finish(journal, journal.entries, timings)


def open_session(plan: Plan, watch: RunWatch, resources: Mapping[str, float] | None = None) -> AbstractContextManager[Session]:
    """The scheduler of a plan's job, with what shows `watch`. `resources` are those of the in-process cluster's worker."""
    job = plan.job
    listen = parse_listen(job.listen) if job.listen else None
    return runner(job.scheduler, plan.budget.workers, resources, watch, listen, job.performance_report)


def _places(plan: Plan) -> str:
    return ", ".join(str(target.output.directory) for target in plan.targets)
