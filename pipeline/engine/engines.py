"""The engines of a job: their steps in the graph of a run, and what is done about the outcomes.

`trtllm-build` makes all ranks of a checkpoint in one call, one task; through Python each rank is a task. Tasks return plain values;
this module acts on them: it names the directory, or says why there is no engine.
"""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.engine.check import arranged_weights, check_checkpoint, checksums
from pipeline.engine.inputs import engine_directory
from pipeline.engine.log import BuildLog, Tail
from pipeline.engine.messages import lost_builder, no_builder, no_engine, no_worker
from pipeline.engine.output import EngineDirectory
from pipeline.errors import BadInput, EngineFailed, HeadraceError, Interrupted, Problem, WriteFailed
from pipeline.planning.build_steps import GPU, BuildStep, build_steps, builder_of, option_table
from pipeline.planning.dask_graph import stage_graph
from pipeline.planning.engine_options import EngineRequest
from pipeline.run.results import Built
from pipeline.run.schedulers import Lost, Session
from pipeline.tensor.system_errors import refusing
from stages.build import BuilderOutcome
from stages.build.builders import Builder, BuilderProbe, probe

WAIT_SECONDS = 10.0  # for a worker with a GPU when all is converted: one that was lost may come back


@dataclass
class _Engine:
    """An engine under construction: its steps, and what became of them. `failure`: why there is none, once it has ended."""

    request: EngineRequest
    place: EngineDirectory
    token: Path
    steps: tuple[BuildStep, ...]
    outcomes: list[BuilderOutcome] = field(default_factory=list)
    lost: str = ""
    failure: HeadraceError | None = None


class Looked(NamedTuple):
    """The outcome of a look at a request: the problems with it, and its builder where that is not there or does not run."""

    problems: list[Problem]
    without: BuilderProbe | None


class Engines:
    """The engines of a job: checked before anything is written, and built each when its checkpoint is complete.

    `scheduler`: its address, or the class of its cluster, for messages. `elsewhere`: its workers are other processes.
    """

    def __init__(
        self, requests: Sequence[EngineRequest], log: BuildLog, scheduler: str, overwrite: bool = False, elsewhere: bool = False
    ) -> None:
        self.requests, self.log, self.scheduler, self.overwrite, self.elsewhere = requests, log, scheduler, overwrite, elsewhere
        self._probes: dict[Builder, BuilderProbe] = {}
        self._engines: list[_Engine] = []
        self._results: dict[Path, Built] = {}
        self._tail: Tail | None = None
        self._dashboard = ""
        self._converts = False

    def prepare(self, session: Session | None = None, wait: bool = True) -> None:
        """Find the builder, and check each request as the builder would.

        `session`: the cluster to find it on, where workers are on other machines. `wait`: until a worker with a GPU is there;
        otherwise, where there is none yet, the builder's own checks are left to it. Raises BadInput for wrong options and
        directories, and EngineFailed where there is no builder.
        """
        unbuildable: dict[BuilderProbe, list[str]] = {}
        looked = self.look(session, wait)
        if problems := [problem for each in looked for problem in each.problems]:
            raise BadInput(dict.fromkeys(problems))
        for request, each in zip(self.requests, looked, strict=True):
            if each.without:
                unbuildable.setdefault(each.without, []).append(shlex.join(request.command()))
        if unbuildable:
            raise EngineFailed("\n".join(no_builder(probed, commands) for probed, commands in unbuildable.items()))

    def look(self, session: Session | None = None, wait: bool = True) -> list[Looked]:
        """Look at what is in the way of each request, as `prepare` does. Without a `session` nobody elsewhere is asked."""
        looked = []
        for request in self.requests:
            probed = self._probe(request, session, wait)
            with refusing(request.engine, "files that can be read"):
                place, arranged = engine_directory(request, probed), arranged_weights(request)
            problems = [*request.problems(option_table(probed)), *place.obstacles(self._replaces(request))]
            whole = self.complete(request)
            if arranged and not whole and not probed.trouble:
                problems += arranged.problems(probed)
            looked.append(Looked(problems, probed if probed.trouble and not whole else None))
        return looked

    def complete(self, request: EngineRequest) -> bool:
        """Whether a prepared request's engine is there already and is not to be replaced."""
        return not self._replaces(request) and self._place(request).complete

    @property
    def share_gpus(self) -> bool:
        """Whether the builds that are left take GPUs of their own: the ranks of one engine do, in turn.

        Builds of several engines do not: trtllm-build begins with the first GPU, and so does rank 0 of each engine.
        """
        left = [request for request in self.requests if not self.complete(request)]
        probed = self._probes.get(builder_of(left[0])) if len(left) == 1 else None
        return probed is not None and probed.kind == "python"

    def begin(self, stack: ExitStack, session: Session, outputs: Mapping[Path, int]) -> tuple[BuildStep, ...]:
        """Begin the engines that are not up to date, and return their steps in the graph of the run.

        `stack`: on its exit nothing is left of engines that are not whole. `outputs`: the numbers of the targets that the run makes
        whole, by their directories. Raises what `build_engine` raises.
        """
        self._converts = bool(outputs)
        whole = [request for request in self.requests if request.checkpoint not in outputs]
        problems = [problem for request in whole for problem in check_checkpoint(request.checkpoint)]
        if problems:
            raise BadInput(problems)
        for request in self.requests:
            if self.complete(request):
                self._results[request.engine] = Built(request.engine, up_to_date=True)
                continue
            place, probed = self._place(request), self._probes.get(builder_of(request))
            token = stack.enter_context(self._begun(place))
            # A cluster may still know the tasks of an earlier run, so no name is used twice.
            name, kept = f" {uuid.uuid4().hex[:8]}", place.held
            number = outputs.get(request.checkpoint)
            arranged = arranged_weights(request)
            steps = build_steps(
                request,
                number,
                place.ranks,
                name=name,
                probed=probed,
                token=token,
                kept=kept,
                sync=self.elsewhere,
                arranged=arranged,
            )
            self._engines.append(_Engine(request, place, token, steps))
        logs = {step.call.log: engine.place.directory for engine in self._engines for step in engine.steps}
        self._tail = stack.enter_context(self.log.following(logs))
        self._dashboard = session.dashboard
        return tuple(step for engine in self._engines for step in engine.steps)

    def whole(self, output: int | None) -> None:
        """Note that an output is whole, so that its engine is begun; None for the checkpoints that have been whole before."""
        for engine in self._engines:
            if engine.steps[0].output == output:
                call = engine.steps[0].call
                self.log.building(engine.place.directory, call.command(call.probed), self._dashboard)

    def ended(self, result: BuilderOutcome | Lost) -> bool:
        """Take in the result of a step, finish or fail an engine of which all have ended; returns whether it has failed."""
        engine = next(each for each in self._engines if any(step.call.name == result.name for step in each.steps))
        if isinstance(result, Lost):
            engine.lost, result = result.why, BuilderOutcome(result.name, result.code)
        engine.outcomes.append(result)
        if result.code:
            engine.token.unlink(missing_ok=True)  # stops the builders of the other ranks, which are of no use
        if len(engine.outcomes) == len(engine.steps):
            if self._tail:
                self._tail.flush()
            try:
                self._end(engine)
            except EngineFailed as error:
                engine.failure = error
            except OSError as error:
                engine.failure = EngineFailed(f"{engine.place.directory}: the engine could not be built: {error}")
        return engine.failure is not None

    def buildable(self, session: Session) -> bool:
        """Whether there is a worker for what is left, when all is converted; waits a little for one."""
        deadline = time.monotonic() + WAIT_SECONDS
        if not self._unbuilt() or session.offers(GPU):
            return True
        self.log.waiting("GPU", self.scheduler)
        while not session.offers(GPU):
            if time.monotonic() > deadline:
                for engine in self._unbuilt():
                    engine.failure = EngineFailed(no_worker(engine.place.directory, self.scheduler))
                return False
            time.sleep(0.2)
        return True

    def halt(self) -> None:
        """Stop the builders that are at work."""
        for engine in self._engines:
            engine.token.unlink(missing_ok=True)

    def left(self) -> str:
        """The engines that are not there yet, for messages."""
        return ", ".join(str(request.engine) for request in self.requests if request.engine not in self._results)

    def built(self) -> tuple[Built, ...]:
        """Return the engines.

        Where one is not there, raises EngineFailed; BadInput for options that the builder refused in a run that has made nothing.
        """
        failures = [engine.failure for engine in self._engines if engine.failure]
        refused = [problem for failure in failures if isinstance(failure, BadInput) for problem in failure.problems]
        made = self._converts or any(not built.up_to_date for built in self._results.values())
        if refused and not made and all(isinstance(failure, BadInput) for failure in failures):
            raise BadInput(refused)
        if failures:
            others = [str(failure) for failure in failures if not isinstance(failure, BadInput)]
            raise EngineFailed("\n".join([*others, *map(str, refused)]))
        return tuple(self._results[request.engine] for request in self.requests)

    def build(self, session: Session) -> tuple[Built, ...]:
        """Build the engines of checkpoints that are whole. Raises what `build_engine` does; those that could be built are there."""
        try:
            self.prepare(session)
            with ExitStack() as stack:
                steps = self.begin(stack, session, {})
                self.whole(None)
                graph = stage_graph((), builds=steps, halt=self.halt, in_turn=session.client is None)
                for result in session.run(graph):
                    self.ended(result)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; nothing is left of {self.left()}: run the same command again") from None
        return self.built()

    @contextmanager
    def _begun(self, place: EngineDirectory) -> Iterator[Path]:
        """The token of an engine's directory under construction."""
        with ExitStack() as stack:
            try:
                token = stack.enter_context(place.begun())
            except TimeoutError as error:
                text = f"a builder of an earlier run is still at work and has {error} open: end it, and run the same command again"
                raise EngineFailed(text) from None
            except (OSError, WriteFailed) as error:
                raise EngineFailed(f"the engine could not be built: {error}") from error
            yield token

    def _unbuilt(self) -> list[_Engine]:
        return [engine for engine in self._engines if len(engine.outcomes) < len(engine.steps)]

    def _end(self, engine: _Engine) -> None:
        """Finish or fail an engine whose steps have ended."""
        request, outcomes = engine.request, engine.outcomes
        failed = [outcome for outcome in outcomes if outcome.code and not outcome.stopped]
        absent = engine.place.missing()
        refused = [outcome for outcome in failed if outcome.refused]
        without = [outcome for outcome in failed if outcome.probed.trouble]
        unfit = [outcome.unfit for outcome in failed if outcome.unfit]
        command, attempts = shlex.join(request.command()), max(outcome.attempts for outcome in outcomes)
        program = engine.steps[0].call.command(outcomes[0].probed)[0]
        if engine.lost:
            engine.failure = EngineFailed(lost_builder(engine.place, engine.lost))
        elif refused:
            problem = Problem(f"{engine.place.directory}: {program}", refused[0].refused, "options that it takes")
            engine.failure = BadInput([problem])
        elif unfit:
            engine.failure = EngineFailed(f"{engine.place.directory}: no engine is built of weights in another order:\n{unfit[0]}")
        elif without:
            engine.failure = EngineFailed(no_builder(without[0].probed, [command]))
        elif failed or absent:
            engine.failure = EngineFailed(no_engine(engine.place, program, outcomes, absent, attempts, command))
        else:
            seconds = sum(outcome.seconds for outcome in outcomes)
            version = outcomes[0].probed.version  # asked on the machine that built, where it was not known before
            place = replace(engine.place, inputs={**engine.place.inputs, "version": version})
            nbytes = place.finish(engine.token, self._facts(engine, seconds, attempts))
            self.log.built(place.directory, seconds, nbytes)
            self._results[request.engine] = Built(request.engine, seconds, nbytes, attempts)

    def _facts(self, engine: _Engine, seconds: float, attempts: int) -> dict[str, Any]:
        """The facts of a build that headrace.json records beside its inputs."""
        checkpoint = engine.request.checkpoint
        return {
            "checkpoint": {"path": str(checkpoint), "xxh3": checksums(checkpoint)},
            "command": list(engine.steps[0].call.command(engine.outcomes[0].probed)),
            "built_by": engine.place.built_version(),
            "hosts": sorted({outcome.host for outcome in engine.outcomes}),
            "seconds": round(seconds, 3),
            "attempts": attempts,
        }

    def _place(self, request: EngineRequest) -> EngineDirectory:
        return engine_directory(request, self._probes.get(builder_of(request), BuilderProbe()))

    def _probe(self, request: EngineRequest, session: Session | None, wait: bool) -> BuilderProbe:
        """The builder of the machine that will build: on a cluster that of a worker with a GPU, unknown where none is there."""
        builder = builder_of(request)
        if builder not in self._probes and self.elsewhere:
            if session is None:
                return BuilderProbe()
            if not session.offers(GPU):
                if not wait:
                    return BuilderProbe()
                self.log.waiting("GPU", self.scheduler)
            from dask._task_spec import Task

            key = ("probe", uuid.uuid4().hex)
            (self._probes[builder],) = session.run_with(GPU, {key: Task(key, probe, builder)})
        elif builder not in self._probes:
            self._probes[builder] = probe(builder)
        return self._probes[builder]

    def _replaces(self, request: EngineRequest) -> bool:
        return self.overwrite or request.own.overwrite
