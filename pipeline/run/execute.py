"""Run a plan: begin its outputs or take them up again, compute its tasks, finish the outputs. The only module that computes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadInput, Interrupted, WriteFailed
from pipeline.planning.dask_graph import Finish, stage_graph
from pipeline.planning.listen import parse_listen
from pipeline.planning.memory import scratch_window
from pipeline.planning.plans import Plan
from pipeline.run.left_to_do import LeftToDo
from pipeline.run.schedulers import Session, run_threads, runner, thread_name
from pipeline.sinks.journal import Committer
from pipeline.sinks.output import Output
from pipeline.tensor.metering import stage_bytes
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

    `bytes_read`: of the source, each byte once. `bytes_written`: into rank files, without headers and padding. Those of scratch are
    apart, and what an earlier, interrupted run moved is in none of them.
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
    scratch_bytes_read: int = 0
    scratch_bytes_written: int = 0


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
            run.left.begin(stack)
            run.announce(at_hand.dashboard)
            run.do(at_hand)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_places(plan)} is not complete: run the same command again to go on") from None
    except BadInput:
        # Values that no target can hold show when they are read: nothing of the outputs is left then.
        run.left.abandon()
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
        stage_bytes(run.watch.stages, "write"),
        seconds,
        peak_memory_bytes(),
        run.watch.stages,
        run.phases,
        resumed_tasks=run.resumed_tasks,
        scratch_bytes_read=run.watch.scratch_bytes_read,
        scratch_bytes_written=stage_bytes(run.watch.stages, "write_scratch"),
    )


class _Run:
    """A run: what is left to do, and its totals."""

    def __init__(self, plan: Plan, listener: Listener, started: float, watch: RunWatch) -> None:
        self.plan, self.listener, self.started, self.watch = plan, listener, started, watch
        self.began = time.time() - (time.perf_counter() - started)
        self.left = LeftToDo(plan)
        self.phases: dict[str, float] = {}
        self.resumed_tasks = 0

    def announce(self, dashboard: str) -> None:
        active = [left for left in self.left.phases if left.sinks]
        total = sum(left.total_bytes() for left in active)
        done = sum(left.done_bytes() for left in active)
        self.resumed_tasks = sum(len(left.phase.groups) - len(left.groups) for left in active)
        for listener in (self.watch, self.listener):
            listener.started(self.plan, dashboard, total, done, self.resumed_tasks)
        outputs = self.left.phases[-1]
        inputs = {group.number: group.inputs for left in self.left.phases for group in left.groups}
        self.watch.entered(outputs.sinks, outputs.written(), inputs)
        self.watch.bound(group for left in self.left.phases for group in left.groups)

    def do(self, session: Session) -> None:
        """Run what is left: first what only this process can read, then the one graph of all the rest."""
        left, workers = self.left, self.plan.budget.workers
        with ExitStack() as stack:
            committers = [stack.enter_context(Committer(dict(enumerate(each.journals.values())))) for each in left.phases]
            here = [each for each in left.phases if each.phase.here and each.groups]
            for each in here:
                graph = stage_graph(each.groups, known=left.known, name=thread_name)
                for written in self._take(run_threads(graph, workers), committers):
                    left.known |= {chunk: list(parts) for chunk, parts in written.chunk_parts.items()}
            clustered = session.client is not None
            graph = stage_graph(
                [group for each in left.phases if each not in here for group in each.groups],
                self._finishes(),
                known=left.known,
                window=scratch_window(workers) if clustered else None,
                name=int if clustered else thread_name,
                synchronize=self.plan.job.elsewhere,
                pool=left.pool(),
            )
            for _ in self._take(session.run(graph), committers):
                pass
        left.close()

    def _finishes(self) -> list[Finish]:
        outputs = self.left.phases[-1]
        source: dict[Any, int] = {}
        scratch: dict[str, int] = {}
        for group in (group for left in self.left.phases for group in left.groups):
            source |= group.inputs.source
            scratch |= group.inputs.scratch
        read, again = sum(source.values()), sum(scratch.values())
        return [
            Finish(number, place, sink, tuple(journal.entries), self.began, read, again, dict(self.watch.stages))
            for place, (number, journal) in enumerate(outputs.journals.items())
            if isinstance(sink := outputs.phase.sinks[number], Output)
        ]

    def _take(self, results: Iterator[Written | int], committers: Sequence[Committer]) -> Iterator[Written]:
        """Take in the results of tasks as they end: into the journals, and to those who watch. Gives those of groups on."""
        for result in results:
            if isinstance(result, int):  # an output is whole
                self.watch.whole(result)
                continue
            number = self.left.phase_of(result.number)
            committers[number].add(replace(result, number=result.number - self.plan.first_group(number)))
            self.left.free(result.number)
            self.phases[self.plan.phases[number].name] = time.perf_counter() - self.started
            self.watch.advanced(result)
            self.listener.advanced(result)
            yield result


def open_session(plan: Plan, watch: RunWatch, resources: Mapping[str, float] | None = None) -> AbstractContextManager[Session]:
    """The scheduler of a plan's job, with what shows `watch`. `resources` are those of the in-process cluster's worker."""
    job = plan.job
    listen = parse_listen(job.listen) if job.listen else None
    return runner(job.scheduler, plan.budget.workers, resources, watch, listen, job.performance_report)


def _places(plan: Plan) -> str:
    return ", ".join(str(target.output.directory) for target in plan.targets)
