"""Run a plan: begin its outputs or take them up again, compute its tasks, finish the outputs. The only module that computes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.calibration.layer_task import LayerDone
from pipeline.errors import BadInput, Interrupted, SourceChanged, WriteFailed
from pipeline.planning.bind import BoundGroup
from pipeline.planning.build_steps import BuildStep
from pipeline.planning.dask_graph import Finish, no_builds, stage_graph
from pipeline.planning.descriptors import open_files
from pipeline.planning.listen import parse_listen
from pipeline.planning.memory import scratch_window
from pipeline.planning.moments import Moment
from pipeline.planning.plans import Plan
from pipeline.run.left_to_do import LeftToDo
from pipeline.run.results import Built, Result
from pipeline.run.schedulers import Session, run_threads, runner, thread_name
from pipeline.run.workers import admitted, fitted, question_of
from pipeline.sinks.journal import Committer
from pipeline.sinks.output import Output
from pipeline.tensor.metering import stage_bytes
from pipeline.tensor.process import peak_memory_bytes
from pipeline.tensor.system_errors import refusing, sentence
from pipeline.watching.listener import LayerListener, Listener, Silent
from pipeline.watching.state import RunWatch
from stages.write import Written

LOST = "the cluster lost a worker, and scratch that its tasks need again is gone; {} is not complete: run the same command again"


class Builds(Protocol):
    """The engines that are built of a run's outputs, in its graph: `pipeline.engine.engines` has them.

    A build that fails ends no conversion: `built` says so when all is done.
    """

    def begin(self, stack: ExitStack, session: Session, outputs: Mapping[Path, int]) -> Sequence[BuildStep]: ...
    def whole(self, output: int | None) -> None: ...
    def ended(self, result: Any) -> bool: ...
    def buildable(self, session: Session) -> bool: ...
    def halt(self) -> None: ...
    def left(self) -> str: ...
    def built(self) -> tuple[Built, ...]: ...


def execute(
    plan: Plan,
    listener: Listener | None = None,
    *,
    started: float | None = None,
    session: Session | None = None,
    watch: RunWatch | None = None,
    builds: Builds | None = None,
) -> Result:
    """Do what a plan says. `started` is when the run began, by time.perf_counter(), where planning is to be counted.

    `session`: the scheduler, where one is at hand; else the job's is opened. `watch` is what can be looked at meanwhile, as
    headrace's page does; it hears of each task before the listener. `builds`: engines that are built in the same graph.

    Raises BadInput where an output directory is taken or has no room, Interrupted on Ctrl-C or SIGTERM, and WriteFailed where
    the disk or a worker fails; the same plan executed again goes on where this one ended. Raises SourceChanged where the source was
    written to meanwhile: then nothing is left to go on with. Raises what `builds` say of engines that could not be built, when all
    else is done.
    """
    started = time.perf_counter() if started is None else started
    outputs = tuple(path for target in plan.targets for path in target.output.paths)
    with refusing(_places(plan), "a place that can be looked at"):
        plan = _tidy(plan)
        up_to_date = plan.up_to_date and not plan.job.overwrite
    if up_to_date:
        for cut in plan.scratch:
            cut.release()
        if not builds:
            return Result(outputs, 0, 0, time.perf_counter() - started, peak_memory_bytes(), {}, up_to_date=True)
    with refusing(_places(plan), "a directory that can be written"):
        obstacles = () if up_to_date else plan.obstacles()
    if obstacles:
        raise BadInput(obstacles)
    run = _Run(plan, (not up_to_date and listener) or Silent(), started, watch or RunWatch(), builds)
    try:
        # Locks are held until the session has ended: a task that is at work may end after the run.
        with (
            ExitStack() as locks,
            nullcontext(session) if session else open_session(plan, run.watch) as at_hand,
            ExitStack() as stack,
        ):
            question = question_of(plan) if plan.job.elsewhere else None
            if question:
                run.fit(fitted(plan, at_hand.client, question))
            steps = builds.begin(stack, at_hand, run.pending()) if builds else ()
            run.left.begin(locks)
            if question:
                run.admission = stack.enter_context(admitted(at_hand.client, question, run.left.marks()))
            run.announce(at_hand.dashboard, steps)
            try:
                run.do(at_hand, steps)
            except (BadInput, SourceChanged) as error:
                # Values that no target can hold show when they are read, and so does a source that changes: nothing of the outputs
                # is left. What is refused before leaves what earlier runs did.
                run.left.abandon(isinstance(error, SourceChanged))
                raise
    except KeyboardInterrupt:
        rest = f"nothing is left of {builds.left()}" if run.result and builds else f"{_places(plan)} is not complete"
        what = "" if run.result else " to go on"
        raise Interrupted(f"interrupted; {rest}: run the same command again{what}") from None
    except OSError as error:
        raise WriteFailed(
            f"{sentence(error)}; {_places(plan)} is not complete: mend this and run the same command again"
        ) from error
    finally:
        run.finished()
    assert run.result
    return replace(run.result, up_to_date=up_to_date, engines=builds.built() if builds else ())


class _Run:
    """A run: what is left to do, and its totals. `result`: of the conversion, once all outputs are whole."""

    def __init__(self, plan: Plan, listener: Listener, started: float, watch: RunWatch, builds: Builds | None = None) -> None:
        self.plan, self.listener, self.started, self.watch, self.builds = plan, listener, started, watch, builds
        self.began = time.time() - (time.perf_counter() - started)
        self.left = LeftToDo(plan)
        self.phases: dict[str, float] = {}
        self.resumed_tasks = 0
        self.moments: list[Moment] = []  # of the tasks that are done
        self.done: set[int] = set()  # the numbers of their groups
        self.read_bytes = self.scratch_bytes = 0  # that all groups left read
        self.reads_source = False
        self.admission = ""  # the name by which tasks ask whether their worker may do them
        self.result: Result | None = None

    def fit(self, plan: Plan) -> None:
        """Take the plan as the workers can do it. Raises BadInput where that one could not start."""
        if plan is not self.plan and (obstacles := plan.obstacles()):
            raise BadInput(obstacles)
        self.plan, self.left = plan, LeftToDo(plan)

    def pending(self) -> dict[Path, int]:
        """The numbers of the targets that the run makes whole, by their directories."""
        sinks = self.plan.phases[-1].sinks
        return {sink.directory: number for number, sink in enumerate(sinks) if self.plan.job.overwrite or not sink.complete}

    def announce(self, dashboard: str, steps: Sequence[BuildStep]) -> None:
        active = [left for left in self.left.phases if left.sinks]
        total = sum(left.total_bytes() for left in active)
        done = sum(left.done_bytes() for left in active)
        self.resumed_tasks = sum(len(left.phase.groups) - len(left.groups) for left in active)
        unlocked = [str(journal.path.parent) for each in active for journal in each.journals.values() if not journal.locked]
        notes = self.left.notes + [
            f"{place} is on a file system without locks: its note of this process alone keeps other jobs away" for place in unlocked
        ]
        plan = replace(self.plan, notes=(*self.plan.notes, *notes)) if notes else self.plan
        self.watch.started(plan, dashboard, total, done, self.resumed_tasks)
        outputs = self.left.phases[-1]
        inputs = {group.number: group.inputs for left in self.left.phases for group in left.groups}
        self.watch.entered(outputs.sinks, outputs.written(), inputs)
        groups = (group for left in self.left.phases for group in left.groups)
        self.watch.bound(groups, steps, len(self.left.calibrations))
        self.listener.started(plan, dashboard, total, done, self.resumed_tasks)

    def do(self, session: Session, steps: Sequence[BuildStep] = ()) -> None:
        """Run what is left: first what only this process can read, then the one graph of all the rest."""
        left, workers = self.left, self.plan.budget.workers
        with ExitStack() as stack:
            made = (Committer(dict(enumerate(each.journals.values())), each.vouched()) for each in left.phases)
            committers = [stack.enter_context(each) for each in made]
            self._count_bytes()
            here = [each for each in left.phases[:-1] if each.phase.here and each.groups]
            for each in here:
                with closing(run_threads(stage_graph(each.groups, known=left.known, name=thread_name), workers)) as results:
                    for result in results:
                        self._advanced(result, committers)
                each.groups = ()
            while True:
                try:
                    self._run_graph(session, steps, stack, committers)
                    return
                except OSError as error:
                    # A cluster that has lost a worker does again what that one alone had the results of, scratch or not.
                    # These results are known here: another graph does without. A build that is at work is not begun twice.
                    if not left.gave_up(error.filename):
                        raise
                    if steps:
                        raise WriteFailed(LOST.format(_places(self.plan))) from error
                    for committer in committers:
                        committer.commit()
                    left.leave_out(self.done)

    def _run_graph(self, session: Session, steps: Sequence[BuildStep], stack: ExitStack, committers: Sequence[Committer]) -> None:
        """Run the one graph of what is left. `stack`: of what the conversion alone needs."""
        left, workers, last = self.left, self.plan.budget.workers, self.left.phases[-1]
        clustered = session.client is not None
        # Of workers elsewhere nobody knows how many files they may open.
        journals = sum(len(each.journals) for each in left.phases)
        counted: dict[str, Any] = {} if self.plan.job.elsewhere else {"open_files": open_files(workers, journals)}
        groups, run = [group for each in left.phases for group in each.groups], session.run
        if last.phase.here:
            self._fill_scratch([group for group in groups if not group.is_last], committers, session)
            groups, clustered, run = list(last.groups), False, lambda graph: run_threads(graph, workers)
        finishes = self._finishes()
        graph = stage_graph(
            groups,
            finishes,
            admission=self.admission,
            calibrations=left.calibrations,
            builds=steps,
            halt=self.builds.halt if self.builds else no_builds,
            in_turn=not clustered,
            known=left.known,
            window=scratch_window(_threads(session, workers)) if clustered else None,
            name=int if clustered else thread_name,
            run_mark=_mark(self.plan),
            synchronize=self.plan.job.elsewhere,
            **counted,
            pool=left.pool(),
            uploads=left.uploads(),
        )
        if self.builds:
            self.builds.whole(None)
        unfinished = len(groups) + len(finishes)
        if not unfinished and not self._converted(stack, session):
            return
        with closing(run(graph)) as results:
            for result in results:
                if isinstance(result, int):
                    self._whole(result, committers[-1])
                elif isinstance(result, Written):
                    self._advanced(result, committers)
                elif isinstance(result, LayerDone):
                    self._calibrated(result)
                    continue
                else:
                    self._built(result)
                    continue
                unfinished -= 1
                if not unfinished and not self._converted(stack, session):
                    return

    def _fill_scratch(self, groups: Sequence[BoundGroup], committers: Sequence[Committer], session: Session) -> None:
        """Have the workers write all chunks of scratch, which this process then assembles."""
        if not groups:
            return
        left, mark = self.left, _mark(self.plan)
        known, admission = left.known, self.admission
        graph = stage_graph(
            groups, calibrations=left.calibrations, admission=admission, known=known, run_mark=mark, synchronize=True
        )
        with closing(session.run(graph)) as results:
            for result in results:
                if isinstance(result, LayerDone):
                    self._calibrated(result)
                else:
                    self._advanced(result, committers)
        left.leave_out(self.done)

    def finished(self) -> None:
        """Tell those who watch that the run is over, however it ended."""
        self.watch.finished()
        if self.result is None or self.builds:
            self.listener.finished()

    def _count_bytes(self) -> None:
        """Count what the groups left read of the source and of scratch."""
        source: dict[Any, int] = {}
        scratch: dict[str, int] = {}
        for group in (group for left in self.left.phases for group in left.groups):
            source |= group.inputs.source
            scratch |= group.inputs.scratch
        self.read_bytes, self.scratch_bytes = sum(source.values()), sum(scratch.values())
        self.reads_source = bool(self.read_bytes or self.left.calibrations)

    def _finishes(self) -> list[Finish]:
        """The outputs of this run; one that is whole already is made so by no task, but has its place among the sinks."""
        outputs = self.left.phases[-1]
        # A run that reads scratch alone need not see the source, nor need its workers.
        files = self.plan.source.files if self.reads_source and not self.plan.source.in_memory else ()
        more = tuple(self.moments), int(self.plan.budget.limit_bytes), tuple(cut.stage for cut in self.plan.scratch)
        moved = self.began, self.read_bytes, self.scratch_bytes, dict(self.watch.stages), files
        entries = {number: tuple(journal.entries) for number, journal in outputs.journals.items()}
        return [
            Finish(number, place, sink, entries.get(number, ()), *moved, *more)
            for place, number in enumerate(outputs.sinks)
            if isinstance(sink := outputs.phase.sinks[number], Output)
        ]

    def _advanced(self, result: Written, committers: Sequence[Committer]) -> None:
        """Take in the result of a group: into the journals, and to those who watch."""
        number = self.left.phase_of(result.number)
        committers[number].add(replace(result, number=result.number - self.plan.first_group(number)))
        self.done.add(result.number)
        if result.ended:  # and not left out, as its output is whole
            self.moments.append(Moment(result.ended, result.bytes_written, result.memory_bytes))
        self.left.written(result)
        self.left.free(result.number)
        self.phases[self.plan.phases[number].name] = time.perf_counter() - self.started
        self.watch.advanced(result)
        self.listener.advanced(result)

    def _whole(self, number: int, committer: Committer) -> None:
        """Note that an output is whole: it needs no journal any more, and its engine is begun."""
        if number not in self.left.phases[-1].journals:  # noted before
            return
        committer.leave(self.left.whole(number))
        self.watch.whole(number)
        if self.builds:
            self.builds.whole(number)

    def _calibrated(self, result: LayerDone) -> None:
        """Take in the result of a layer that is calibrated: what it left is on the disk."""
        self.watch.calibrated(result)
        if isinstance(self.listener, LayerListener):
            self.listener.calibrated(result.layer + 1, result.layers, self.watch.calibration_seconds_left or 0.0)

    def _built(self, result: Any) -> None:
        """Take in the result of a build."""
        assert self.builds
        self.watch.built(result.name, result.seconds, self.builds.ended(result))

    def _converted(self, stack: ExitStack, session: Session) -> bool:
        """Note that all outputs are whole, which waits for no build; returns whether a worker can do those that are left.

        `stack`: of what the conversion alone needs.
        """
        stack.close()
        self.left.close()
        for cut in self.plan.scratch:
            cut.release()
        if not self.builds:
            self.listener.finished()
        watch = self.watch
        self.result = Result(
            tuple(path for target in self.plan.targets for path in target.output.paths),
            watch.bytes_read,
            stage_bytes(watch.stages, "write"),
            time.perf_counter() - self.started,
            peak_memory_bytes(),
            watch.stages,
            self.phases,
            resumed_tasks=self.resumed_tasks,
            scratch_bytes_read=watch.scratch_bytes_read,
            scratch_bytes_written=stage_bytes(watch.stages, "write_scratch"),
        )
        return self.builds is None or self.builds.buildable(session)


def open_session(plan: Plan, watch: RunWatch, resources: Mapping[str, float] | None = None) -> AbstractContextManager[Session]:
    """The scheduler of a plan's job, with what shows `watch`. `resources` are those of the in-process cluster's worker."""
    job = plan.job
    listen = parse_listen(job.listen) if job.listen else None
    return runner(job.scheduler, plan.budget.workers, resources, watch, listen, job.performance_report, job.cluster)


def _tidy(plan: Plan) -> Plan:
    """Look after what is whole already: the journal that a run left which was stopped just then, and the disk.

    An output that an earlier boot left to the system to write is held against its checksums; with `--sync` all are brought to disk.
    Returns the plan, with a note for each output that a power cut has damaged.
    """
    damaged = []
    for sink in (*plan.scratch, *(target.output for target in plan.targets)):
        if sink.complete:
            sink.forget_journal()
            if not isinstance(sink, Output):
                sink.join()
    if plan.job.overwrite:
        return plan
    for output in (target.output for target in plan.targets if target.output.complete):
        try:
            if output.doubtful and not output.settle():
                damaged.append(f"{output.directory} is not as it was written before the machine was started again: it is made anew")
            elif plan.job.sync:
                output.flush()
        except OSError as error:
            raise WriteFailed(f"{sentence(error)}; {output.directory} cannot be looked at or brought to the disk") from error
    return replace(plan, notes=(*plan.notes, *damaged)) if damaged else plan


def _threads(session: Session, planned: int) -> int:
    """How many tasks a cluster runs at once: what is planned for this process, or as many as its workers have threads."""
    return max(planned, sum(map(int, session.client.nthreads().values())))


def _mark(plan: Plan) -> str:
    """A part of the keys of a run's tasks, for a scheduler that may have those of others."""
    return uuid.uuid4().hex[:8] if plan.job.elsewhere else ""


def _places(plan: Plan) -> str:
    return ", ".join(str(target.output.directory) for target in plan.targets)
