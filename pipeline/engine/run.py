"""Build the engines that a job asks for: as Dask tasks that take a worker's resource `GPU`, in the conversion's own session.

`trtllm-build` makes all ranks of a checkpoint in one call, one task; through Python each rank is a task. Tasks give values back;
what follows from them (a name for the directory, another attempt, a refusal) is done here.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.check import check_checkpoint, checksums, identity, world_size
from pipeline.engine.log import BuildLog
from pipeline.engine.messages import no_builder, no_engine
from pipeline.engine.output import EngineDirectory
from pipeline.errors import BadInput, EngineFailed, HeadraceError, Interrupted, Problem, WriteFailed
from pipeline.planning.builder_options import Table, command_words, known_options, parse_help
from pipeline.planning.engine_options import Request
from pipeline.run.execute import Built, Result, execute, open_session
from pipeline.run.schedulers import Session, runner
from pipeline.watching.listener import Listener
from pipeline.watching.state import Watch
from stages.build import Builder, Call, Outcome, Probe, gpus, probe, run

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan

GPU: Mapping[str, float] = {"GPU": 1}  # what a task takes of a worker


def build_engine(request: Request, log: BuildLog, scheduler: str = "local") -> Built:
    """Build the engine of a finished checkpoint.

    Raises BadInput where the checkpoint, an option or the engine's directory is wrong, EngineFailed where the builder fails or is
    missing, Interrupted on Ctrl-C; then nothing is left of the engine but its log.
    """
    problems = check_checkpoint(request.checkpoint)
    if problems:
        raise BadInput(problems)
    engines = Engines((request,), log, scheduler)
    if not engines.elsewhere:  # what is there already, or cannot be built here, needs no cluster
        engines.prepare()
        if engines.complete(request):
            return Built(request.engine, up_to_date=True)
    with runner(scheduler, max(gpus(), 1), _here()) as session:
        return engines.build(session)[0]


def convert_and_build(
    plan: Plan,
    requests: Sequence[Request],
    listener: Listener | None,
    log: BuildLog,
    started: float | None = None,
    watch: Watch | None = None,
) -> Result:
    """Convert, then build each target's engine, in one session of the scheduler. Raises what `execute` and `build_engine` do."""
    engines = Engines(requests, log, plan.job.scheduler, overwrite=plan.job.overwrite)
    if not engines.elsewhere:
        engines.prepare()
        if plan.up_to_date and all(map(engines.complete, requests)):
            done = tuple(Built(request.engine, up_to_date=True) for request in requests)
            return replace(execute(plan, listener, started=started), engines=done)
    watch = watch or Watch()
    with open_session(plan, watch, _here()) as session:
        engines.prepare(session, wait=False)
        result = execute(plan, listener, started=started, session=session, watch=watch)
        return replace(result, engines=engines.build(session))


def _here() -> Mapping[str, float]:
    """What the in-process worker has to give: this machine's GPUs, and one where none shows, as the builder is to say so."""
    return {"GPU": max(gpus(), 1)}


@dataclass
class _Engine:
    """One engine on its way: its calls by name, and how they ended."""

    request: Request
    place: EngineDirectory
    token: Path = Path()
    command: tuple[str, ...] = ()
    calls: dict[str, Call] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    attempts: int = 0


class Engines:
    """The engines of a job: looked at before anything is written, built once their checkpoints are whole."""

    def __init__(self, requests: Sequence[Request], log: BuildLog, scheduler: str, overwrite: bool = False) -> None:
        self.requests, self.log, self.scheduler, self.overwrite = requests, log, scheduler, overwrite
        self.elsewhere = "://" in scheduler
        self._probes: dict[Builder, Probe] = {}

    def prepare(self, session: Session | None = None, wait: bool = True) -> None:
        """Find the builder and refuse what it would. `session`: where workers are elsewhere, the cluster to look on.

        `wait`: until one with a GPU is there; else, where none is, no more is asked of the builder now. Raises BadInput and
        EngineFailed.
        """
        problems: list[Problem] = []
        nowhere: dict[Probe, list[str]] = {}
        for request in self.requests:
            found = self._probe(request, session, wait)
            problems += request.problems(_table(found))
            problems += self._place(request, found).obstacles(self._replaces(request))
            if found.trouble and not self.complete(request):
                nowhere.setdefault(found, []).append(shlex.join(request.command()))
        if problems:
            raise BadInput(dict.fromkeys(problems))
        if nowhere:
            raise EngineFailed("\n".join(no_builder(found, commands) for found, commands in nowhere.items()))

    def complete(self, request: Request) -> bool:
        """Whether an engine that has been prepared is there already, and stays."""
        return not self._replaces(request) and self._place(request, self._probes[_builder(request)]).complete

    def build(self, session: Session) -> tuple[Built, ...]:
        """Build those that are not up to date. Raises as `build_engine`; those that could be built are then there."""
        results: dict[Path, Built] = {}
        try:
            self.prepare(session)
            problems = [problem for request in self.requests for problem in check_checkpoint(request.checkpoint)]
            if problems:
                raise BadInput(problems)
            done = [request for request in self.requests if self.complete(request)]
            results |= {request.engine: Built(request.engine, up_to_date=True) for request in done}
            missing = [request for request in self.requests if request not in done]
            engines = [_Engine(each, self._place(each, self._probes[_builder(each)])) for each in missing]
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
        """Run the builders; gives each engine when its last task has ended."""
        by_name = {name: engine for engine in engines for name in engine.calls}
        logs = [call.log for engine in engines for call in engine.calls.values()]
        with self.log.following(logs) as tail:
            calls = [call for engine in engines for call in engine.calls.values()]
            for outcome in session.run_with(GPU, _graph("build", run, {call.name: call for call in calls})):
                engine = by_name[outcome.name]
                engine.outcomes.append(outcome)
                if outcome.code:
                    engine.token.unlink(missing_ok=True)  # the other ranks are of no use
                if len(engine.outcomes) == len(engine.calls):
                    tail.flush()
                    yield engine

    def _call(self, engine: _Engine) -> None:
        """Say what the builder is to do, in a call for each task, and make room for it."""
        request, place = engine.request, engine.place
        found = self._probes[_builder(request)]
        words = [*request.container(place.partial), request.own.trtllm_build] if request.own.container else [*found.words]
        words += ["--checkpoint_dir", str(request.checkpoint), "--output_dir", str(place.partial)]
        words += command_words(request.arguments(_table(found)))
        ranks: list[int | None] = list(range(place.ranks)) if found.kind == "python" else [None]
        engine.attempts += 1
        engine.command, engine.outcomes, engine.calls = tuple(words), [], {}
        place.clear(engine.token, place.journal)
        engine.token.touch()
        for rank in ranks:
            # A cluster may still know the tasks of an earlier run: names are never used twice.
            name = f"{place.directory.name}{'' if rank is None else f' rank {rank}'} {uuid.uuid4().hex[:8]}"
            own = () if rank is None else ("--rank", str(rank))
            engine.calls[name] = Call(name, (*words, *own), place.partial, place.log(rank), engine.token, self.elsewhere)

    def _ended(self, engine: _Engine, results: dict[Path, Built], failures: list[HeadraceError]) -> bool:
        """Take in an engine whose calls have ended; whether that was its last attempt."""
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
        """What headrace.json says of a build beside its inputs."""
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
        if not session.offers(GPU):
            self.log.waiting("GPU", self.scheduler)

    def _probe(self, request: Request, session: Session | None, wait: bool) -> Probe:
        """What the machine that builds has; a cluster is asked on a worker with a GPU."""
        builder = _builder(request)
        if builder not in self._probes and self.elsewhere and session:
            if not wait and not session.offers(GPU):
                return Probe()
            self._announce(session)
            (self._probes[builder],) = session.run_with(GPU, _graph("probe", probe, {uuid.uuid4().hex[:8]: builder}))
        elif builder not in self._probes:
            self._probes[builder] = probe(builder)
        return self._probes[builder]

    def _place(self, request: Request, found: Probe) -> EngineDirectory:
        table = known_options()
        given = request.arguments(table)
        # Of an option that this version does not know nobody can say that it changes nothing.
        deciding = {name: list(words) for name, words in sorted(given.items()) if name not in table or not table[name].inert}
        inputs = {
            "checkpoint": dict(request.identity) or identity(request.checkpoint),
            "options": deciding,
            "files": _files(word for name, words in deciding.items() if _is_path(name) for word in words),
            "container": list(request.own.container),
            "version": found.version,
        }
        return EngineDirectory(request.engine, request.ranks or world_size(request.checkpoint), inputs)

    def _replaces(self, request: Request) -> bool:
        return self.overwrite or request.own.overwrite


def _graph(prefix: str, function: Any, arguments: Mapping[str, Any]) -> Any:
    """A task for each argument, by name."""
    from dask._task_spec import Task

    keys = {name: (prefix, name, number) for number, name in enumerate(arguments)}
    return {keys[name]: Task(keys[name], function, argument) for name, argument in arguments.items()}


def _table(found: Probe) -> Table:
    return parse_help(found.help) or known_options()


def _builder(request: Request) -> Builder:
    return Builder(request.own.builder, request.own.trtllm_build, request.own.container)


def _is_path(name: str) -> bool:
    return name in known_options() and known_options()[name].type == "path"


def _files(words: Iterator[str]) -> dict[str, list[int]]:
    """The state of each file that an option names: what it says decides the engine too."""
    return {word: [Path(word).stat().st_size, Path(word).stat().st_mtime_ns] for word in words if Path(word).is_file()}
