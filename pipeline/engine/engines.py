"""The engines of a job, built as Dask tasks that take a worker's resource `GPU`.

`trtllm-build` makes all ranks of a checkpoint in one call, one task; through Python each rank is a task. Tasks return plain values;
this module acts on them: it names the directory, tries again, or refuses.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dask._task_spec import Task

from pipeline.engine.check import check_checkpoint, checksums
from pipeline.engine.inputs import builder_of, engine_directory, option_table
from pipeline.engine.log import BuildLog
from pipeline.engine.messages import no_builder, no_engine
from pipeline.engine.output import EngineDirectory
from pipeline.errors import BadInput, EngineFailed, HeadraceError, Interrupted, Problem, WriteFailed
from pipeline.planning.builder_options import command_words
from pipeline.planning.engine_options import EngineRequest
from pipeline.run.execute import Built
from pipeline.run.schedulers import Session
from stages.build import Builder, BuilderCall, BuilderOutcome, BuilderProbe, probe, run

GPU: Mapping[str, float] = {"GPU": 1}  # the resources of a worker that a task takes


@dataclass
class _Engine:
    """An engine under construction: its builder's calls by name, and their outcomes. `attempts`: begun so far."""

    request: EngineRequest
    place: EngineDirectory
    token: Path = Path()
    command: tuple[str, ...] = ()
    calls: dict[str, BuilderCall] = field(default_factory=dict)
    outcomes: list[BuilderOutcome] = field(default_factory=list)
    seconds: float = 0.0
    attempts: int = 0


class Engines:
    """The engines of a job: checked before anything is written, and built once their checkpoints are complete."""

    def __init__(self, requests: Sequence[EngineRequest], log: BuildLog, scheduler: str, overwrite: bool = False) -> None:
        self.requests, self.log, self.scheduler, self.overwrite = requests, log, scheduler, overwrite
        self.elsewhere = "://" in scheduler
        self._probes: dict[Builder, BuilderProbe] = {}

    def prepare(self, session: Session | None = None, wait: bool = True) -> None:
        """Find the builder, and check each request as the builder would.

        `session`: the cluster to find it on, where workers are on other machines. `wait`: until a worker with a GPU is there;
        otherwise, where there is none yet, the builder's own checks are left for later. Raises BadInput for wrong options and
        directories, and EngineFailed where there is no builder.
        """
        problems: list[Problem] = []
        unbuildable: dict[BuilderProbe, list[str]] = {}
        for request in self.requests:
            probed = self._probe(request, session, wait)
            problems += request.problems(option_table(probed))
            problems += engine_directory(request, probed).obstacles(self._replaces(request))
            if probed.trouble and not self.complete(request):
                unbuildable.setdefault(probed, []).append(shlex.join(request.command()))
        if problems:
            raise BadInput(dict.fromkeys(problems))
        if unbuildable:
            raise EngineFailed("\n".join(no_builder(probed, commands) for probed, commands in unbuildable.items()))

    def complete(self, request: EngineRequest) -> bool:
        """Whether a prepared request's engine is there already and is not to be replaced."""
        return not self._replaces(request) and engine_directory(request, self._probes[builder_of(request)]).complete

    def build(self, session: Session) -> tuple[Built, ...]:
        """Build the engines that are not up to date.

        Raises what `build_engine` raises; the engines that could be built are there then.
        """
        results: dict[Path, Built] = {}
        try:
            self.prepare(session)
            problems = [problem for request in self.requests for problem in check_checkpoint(request.checkpoint)]
            if problems:
                raise BadInput(problems)
            done = [request for request in self.requests if self.complete(request)]
            results |= {request.engine: Built(request.engine, up_to_date=True) for request in done}
            missing = [request for request in self.requests if request not in done]
            engines = [_Engine(each, engine_directory(each, self._probes[builder_of(each)])) for each in missing]
            self._build(engines, session, results)
        except KeyboardInterrupt:
            left = [str(request.engine) for request in self.requests if request.engine not in results]
            raise Interrupted(f"interrupted; nothing is left of {', '.join(left)}: run the same command again") from None
        except TimeoutError as error:
            text = f"a builder of an earlier run is still at work and has {error} open: end it, and run the same command again"
            raise EngineFailed(text) from None
        except (OSError, WriteFailed) as error:
            raise EngineFailed(f"the engine could not be built: {error}") from error
        return tuple(results[request.engine] for request in self.requests)

    def _build(self, engines: list[_Engine], session: Session, results: dict[Path, Built]) -> None:
        failures: list[HeadraceError] = []
        with ExitStack() as stack:
            for engine in engines:
                engine.token = stack.enter_context(engine.place.begun())
            waiting = engines
            while waiting:
                for engine in waiting:
                    self._call(engine)
                    self.log.building(engine.place.directory, engine.command, session.dashboard)
                self._announce(session)
                waiting = [each for each in self._attempt(waiting, session) if not self._ended(each, results, failures)]
        if failures:
            raise failures[0] if len(failures) == 1 else EngineFailed("\n".join(map(str, failures)))

    def _attempt(self, engines: list[_Engine], session: Session) -> Iterator[_Engine]:
        """Run the builders, and yield each engine when its last task has ended."""
        by_name = {name: engine for engine in engines for name in engine.calls}
        logs = [call.log for engine in engines for call in engine.calls.values()]
        with self.log.following(logs) as tail:
            calls = [call for engine in engines for call in engine.calls.values()]
            for outcome in session.run_with(GPU, _graph("build", run, {call.name: call for call in calls})):
                engine = by_name[outcome.name]
                engine.outcomes.append(outcome)
                if outcome.code:
                    engine.token.unlink(missing_ok=True)  # stops the builders of the other ranks, which are of no use
                if len(engine.outcomes) == len(engine.calls):
                    tail.flush()
                    yield engine

    def _call(self, engine: _Engine) -> None:
        """Prepare the engine's next attempt: a call of the builder for each task, and an empty directory."""
        request, place = engine.request, engine.place
        probed = self._probes[builder_of(request)]
        words = [*request.container(place.partial), request.own.trtllm_build] if request.own.container else [*probed.words]
        words += ["--checkpoint_dir", str(request.checkpoint), "--output_dir", str(place.partial)]
        words += command_words(request.arguments(option_table(probed)))
        ranks: list[int | None] = list(range(place.ranks)) if probed.kind == "python" else [None]
        engine.attempts += 1
        engine.command, engine.outcomes, engine.calls = tuple(words), [], {}
        place.clear(engine.token, place.journal)
        engine.token.touch()
        for rank in ranks:
            # A cluster may still know the tasks of an earlier run, so no name is used twice.
            name = f"{place.directory.name}{'' if rank is None else f' rank {rank}'} {uuid.uuid4().hex[:8]}"
            own = () if rank is None else ("--rank", str(rank))
            engine.calls[name] = BuilderCall(name, (*words, *own), place.partial, place.log(rank), engine.token, self.elsewhere)

    def _ended(self, engine: _Engine, results: dict[Path, Built], failures: list[HeadraceError]) -> bool:
        """Finish or fail an engine whose calls have ended, or leave it for another attempt; returns whether it was the last."""
        request, place = engine.request, engine.place
        engine.seconds += sum(outcome.seconds for outcome in engine.outcomes)
        failed = [outcome for outcome in engine.outcomes if outcome.code and not outcome.stopped]
        missing = place.missing()
        refused = [outcome.refused for outcome in failed if outcome.refused]
        if refused:
            failures.append(BadInput([Problem(f"{place.directory}: {engine.command[0]}", refused[0], "options that it takes")]))
        elif (failed or missing) and engine.attempts <= request.own.retries:
            self.log.again(place.directory, engine.attempts + 1, request.own.retries + 1)
            return False
        elif failed or missing:
            command = shlex.join(request.command())
            text = no_engine(place, engine.command[0], engine.outcomes, missing, engine.attempts, command)
            failures.append(EngineFailed(text))
        else:
            nbytes = place.finish(engine.token, self._facts(engine))
            self.log.built(place.directory, engine.seconds, nbytes)
            results[request.engine] = Built(request.engine, engine.seconds, nbytes, engine.attempts)
        return True

    def _facts(self, engine: _Engine) -> dict[str, Any]:
        """The facts of a build that headrace.json records beside its inputs."""
        checkpoint = engine.request.checkpoint
        return {
            "checkpoint": {"path": str(checkpoint), "xxh3": checksums(checkpoint)},
            "command": list(engine.command),
            "built_by": engine.place.built_version(),
            "hosts": sorted({outcome.host for outcome in engine.outcomes}),
            "seconds": round(engine.seconds, 3),
            "attempts": engine.attempts,
        }

    def _announce(self, session: Session) -> None:
        """Log that the build waits for a worker, where none has a GPU."""
        if not session.offers(GPU):
            self.log.waiting("GPU", self.scheduler)

    def _probe(self, request: EngineRequest, session: Session | None, wait: bool) -> BuilderProbe:
        """The builder of the machine that will build; on a cluster, that of a worker with a GPU."""
        builder = builder_of(request)
        if builder not in self._probes and self.elsewhere and session:
            if not wait and not session.offers(GPU):
                return BuilderProbe()
            self._announce(session)
            (self._probes[builder],) = session.run_with(GPU, _graph("probe", probe, {uuid.uuid4().hex[:8]: builder}))
        elif builder not in self._probes:
            self._probes[builder] = probe(builder)
        return self._probes[builder]

    def _replaces(self, request: EngineRequest) -> bool:
        return self.overwrite or request.own.overwrite


def _graph(prefix: str, function: Any, arguments: Mapping[str, Any]) -> Any:
    """A Dask graph with a task for each argument; `arguments`: by the task's name."""
    keys = {name: (prefix, name, number) for number, name in enumerate(arguments)}
    return {keys[name]: Task(keys[name], function, argument) for name, argument in arguments.items()}
