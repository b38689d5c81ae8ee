"""Run a plan: begin its outputs or take them up again, compute its tasks, finish the outputs. The only module that computes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadInput, Interrupted, WriteFailed
from pipeline.planning.dask_graph import BoundGroup, Finish, bind, stage_graph
from pipeline.planning.listen import parse_listen
from pipeline.planning.memory import scratch_window
from pipeline.planning.plans import Phase, Plan, Sink
from pipeline.run.schedulers import Session, run_threads, runner, thread_name
from pipeline.sinks.journal import Committer, Journal
from pipeline.sinks.output import Output
from pipeline.sinks.remote import RemoteGroup
from pipeline.sinks.reserve import missing
from pipeline.sinks.scratch import ScratchGroup, chunk_parts
from pipeline.tensor.blocks import Part
from pipeline.watching.listener import Listener, Silent
from pipeline.watching.process import peak_memory_bytes
from pipeline.watching.state import RunWatch

if TYPE_CHECKING:
    from stages.write import Written


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
    """The outcome of a conversion. Sizes in bytes, times in seconds.

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
        for target in plan.targets:  # a run that was stopped between its last output and this
            target.output.forget_journal()
        for cut in plan.scratch:
            cut.release()
        return Result(outputs, 0, 0, time.perf_counter() - started, peak_memory_bytes(), {}, up_to_date=True)
    obstacles = plan.obstacles()
    if obstacles:
        raise BadInput(obstacles)
    listener = listener or Silent()
    run = _Run(plan, listener, started, watch or RunWatch())
    try:
        with nullcontext(session) if session else open_session(plan, run.watch) as at_hand, ExitStack() as stack:
            run.begin(stack)
            run.announce(at_hand.dashboard)
            run.do(at_hand)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_places(plan)} is not complete: run the same command again to go on") from None
    except BadInput:
        # Values that no target can hold show when they are read: nothing of the outputs is left then.
        run.abandon()
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


@dataclass
class _PhaseRun:
    """The rest of a phase that is to be done: the numbers of its sinks that are written, and its groups.

    `journals` and `created` are by the sinks' numbers: the open journal, and the topmost directory that its beginning made.
    """

    number: int
    phase: Phase
    sinks: tuple[int, ...] = ()
    groups: tuple[BoundGroup, ...] = ()
    journals: dict[int, Journal] = field(default_factory=dict)
    created: dict[int, Path | None] = field(default_factory=dict)

    @property
    def is_scratch(self) -> bool:
        return not isinstance(self.phase.sinks[0], Output)

    def written(self) -> dict[tuple[int, int], int]:
        """The bytes of ranks that an earlier run has written: {(place of the sink among those written, rank): bytes}."""
        totals: dict[tuple[int, int], int] = {}
        for place, journal in enumerate(self.journals.values()):
            for entry in journal.entries:
                for rank, _, nbytes, _ in entry["sums"]:
                    totals[place, rank] = totals.get((place, rank), 0) + nbytes
        return totals

    def total_bytes(self) -> int:
        """The bytes that the phase writes to its sinks, those that an earlier run wrote included."""
        return self.phase.written_bytes(self.sinks)

    def done_bytes(self) -> int:
        count = len(self.phase.groups)
        return self.total_bytes() * (count - len(self.groups)) // max(count, 1) if self.sinks else 0


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
    """A run: what is left to do of each phase, and its totals."""

    def __init__(self, plan: Plan, listener: Listener, started: float, watch: RunWatch) -> None:
        self.plan, self.listener, self.started, self.watch = plan, listener, started, watch
        self.began = time.time() - (time.perf_counter() - started)
        self.phases: dict[str, float] = {}
        self.resumed_tasks = 0
        self.left = [_PhaseRun(number, phase) for number, phase in enumerate(plan.phases)]
        self.known: dict[str, list[Part]] = {}
        self.readers: dict[str, set[int]] = {}  # of chunks that are removed when nothing reads them any more
        self.owners: dict[str, ScratchGroup | RemoteGroup] = {}

    def begin(self, stack: ExitStack) -> None:
        """Begin the outputs that are not whole, or take them up; then find which chunks they need, and which are there."""
        layers: dict[str, Mapping[Any, Any]] = {}
        for phase in reversed(self.left):
            if phase.is_scratch:
                self._begin_scratch(phase, stack, layers)
            else:
                self._begin_outputs(phase, stack, layers)

    def _begin_outputs(self, left: _PhaseRun, stack: ExitStack, layers: dict[str, Mapping[Any, Any]]) -> None:
        overwrite = self.plan.job.overwrite
        left.sinks = tuple(range(len(left.phase.sinks))) if overwrite else left.phase.pending
        for number in left.sinks:
            self._begin_sink(left, number, overwrite, stack)
        done = [frozenset(task for entry in journal.entries for task in entry["done"]) for journal in left.journals.values()]
        todo = sorted(frozenset(range(len(left.phase.groups))) - frozenset.intersection(*done))
        left.groups = tuple(bind(self.plan, left.number, index, left.sinks, layers) for index in todo)

    def _begin_scratch(self, left: _PhaseRun, stack: ExitStack, layers: dict[str, Mapping[Any, Any]]) -> None:
        """Begin a cut of which chunks are needed: those that the groups left to do read, or all, where it is kept and not whole.

        Presence decides: a chunk that is there, and of which the checksums are known, is not made again.
        """
        cuts = [sink for sink in left.phase.sinks if isinstance(sink, ScratchGroup | RemoteGroup)]
        readers = self.left[left.number + 1].groups
        needed = {chunk for group in readers for chunk in group.reads}
        known = {chunk: parts for cut in cuts for chunk, parts in cut.recorded().items()}
        whole = all(cut.complete for cut in cuts)
        sinks = tuple(range(len(cuts)))
        if not needed or (whole and all(self._there(cuts, chunk, known) for chunk in needed)):
            self.known |= known
            return
        left.sinks = sinks
        for number in sinks:
            self._begin_sink(left, number, False, stack)
        known = {chunk: parts for journal in left.journals.values() for chunk, parts in chunk_parts(journal.entries).items()}
        groups = [bind(self.plan, left.number, index, sinks, layers) for index in range(len(left.phase.groups))]
        keep = any(cut.keep for cut in cuts)
        wanted = {chunk for group in groups for chunk in group.writes} if keep else needed
        absent = {chunk for chunk in wanted if not self._there(cuts, chunk, known)}
        left.groups = tuple(group for group in groups if absent.intersection(group.writes))
        again = {chunk for group in left.groups for chunk in group.writes}
        self.known |= {chunk: parts for chunk, parts in known.items() if chunk not in again}
        if not keep:
            for group in readers:
                for chunk in group.reads:
                    self.readers.setdefault(chunk, set()).add(group.number)
                    self.owners[chunk] = _owner(cuts, chunk)

    def _there(self, cuts: Sequence[ScratchGroup | RemoteGroup], chunk: str, known: Mapping[str, Sequence[Part]]) -> bool:
        return _owner(cuts, chunk).has(chunk, known.get(chunk, ()))

    def _begin_sink(self, left: _PhaseRun, number: int, fresh: bool, stack: ExitStack) -> None:
        sink = left.phase.sinks[number]
        created = left.created[number] = missing(sink.directory)
        journal = left.journals[number] = sink.begin(len(left.phase.groups), fresh)
        stack.callback(journal.close)
        if not journal.entries:
            stack.enter_context(_Undo(sink, journal, created))

    def abandon(self) -> None:
        """Remove what the run has made of sinks that are not whole."""
        for left in self.left:
            for number, journal in left.journals.items():
                if not left.phase.sinks[number].complete:
                    left.phase.sinks[number].abandon(journal, left.created[number])

    def announce(self, dashboard: str) -> None:
        active = [left for left in self.left if left.sinks]
        total = sum(left.total_bytes() for left in active)
        done = sum(left.done_bytes() for left in active)
        self.resumed_tasks = sum(len(left.phase.groups) - len(left.groups) for left in active)
        for listener in (self.watch, self.listener):
            listener.started(self.plan, dashboard, total, done, self.resumed_tasks)
        outputs = self.left[-1]
        self.watch.entered(outputs.sinks, outputs.written())
        self.watch.bound(group for left in self.left for group in left.groups)

    def do(self, session: Session) -> None:
        """Run what is left: first what only this process can read, then the one graph of all the rest."""
        with ExitStack() as stack:
            committers = [stack.enter_context(Committer(dict(enumerate(left.journals.values())))) for left in self.left]
            elsewhere = self.plan.job.elsewhere
            here = [left for left in self.left if left.phase.here and left.groups]
            for left in here:
                graph = stage_graph(left.groups, known=self.known, name=thread_name)
                for written in self._take(run_threads(graph, self.plan.budget.workers), committers):
                    self.known |= {chunk: list(parts) for chunk, parts in written.chunk_parts.items()}
            groups = [group for left in self.left if left not in here for group in left.groups]
            graph = stage_graph(
                groups,
                self._finishes(),
                known=self.known,
                window=None if session.client is None else scratch_window(self.plan.budget.workers),
                name=int if session.client is not None else thread_name,
                synchronize=elsewhere,
            )
            for _ in self._take(session.run(graph), committers):
                pass
        outputs = self.left[-1]
        for number, journal in outputs.journals.items():
            if outputs.phase.sinks[number].complete:
                journal.remove()
        for left in self.left[:-1]:
            for number, journal in left.journals.items():
                cut = left.phase.sinks[number]
                if isinstance(cut, ScratchGroup | RemoteGroup) and cut.keep:
                    cut.finish(journal)
                else:
                    journal.remove()

    def _finishes(self) -> list[Finish]:
        outputs = self.left[-1]
        return [
            Finish(number, place, sink, tuple(journal.entries), self.began)
            for place, (number, journal) in enumerate(outputs.journals.items())
            if isinstance(sink := outputs.phase.sinks[number], Output)
        ]

    def _take(self, results: Iterator[Written | int], committers: Sequence[Committer]) -> Iterator[Written]:
        """Take in the results of tasks as they end: into the journals, and to those who watch. Gives those of groups on."""
        for result in results:
            if isinstance(result, int):  # an output is whole
                self.watch.whole(result)
                continue
            number = max(n for n in range(len(self.left)) if self.plan.first_group(n) <= result.number)
            committers[number].add(replace(result, number=result.number - self.plan.first_group(number)))
            self.phases[self.plan.phases[number].name] = time.perf_counter() - self.started
            self.watch.advanced(result)
            self.listener.advanced(result)
            self._free(result.number)
            yield result

    def _free(self, number: int) -> None:
        """Remove the chunks that only this group was still to read."""
        for chunk in [chunk for chunk, readers in self.readers.items() if number in readers]:
            self.readers[chunk].discard(number)
            if not self.readers[chunk]:
                del self.readers[chunk]
                self.owners[chunk].free(chunk)


def _owner(cuts: Sequence[ScratchGroup | RemoteGroup], chunk: str) -> ScratchGroup | RemoteGroup:
    """The cut that a chunk is of, by its name, which begins with the cut's place."""
    return next(cut for cut in cuts if chunk.startswith(f"{cut.place}/"))


def open_session(plan: Plan, watch: RunWatch, resources: Mapping[str, float] | None = None) -> AbstractContextManager[Session]:
    """The scheduler of a plan's job, with what shows `watch`. `resources` are those of the in-process cluster's worker."""
    job = plan.job
    listen = parse_listen(job.listen) if job.listen else None
    return runner(job.scheduler, plan.budget.workers, resources, watch, listen, job.performance_report)


def _places(plan: Plan) -> str:
    return ", ".join(str(target.output.directory) for target in plan.targets)
