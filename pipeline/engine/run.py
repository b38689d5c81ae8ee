"""Build engines of finished checkpoints, or of a conversion in its own session of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.engine.check import check_checkpoint
from pipeline.engine.engines import Engines
from pipeline.engine.log import BuildLog
from pipeline.engine.messages import lacking
from pipeline.errors import BadInput, Problem
from pipeline.planning.engine_options import EngineRequest
from pipeline.run.execute import execute, open_session
from pipeline.run.results import Built, Result
from pipeline.run.schedulers import runner
from pipeline.watching.listener import Listener
from pipeline.watching.state import RunWatch
from stages.build.builders import gpus

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan


def build_engine(request: EngineRequest, log: BuildLog, scheduler: str = "local") -> Built:
    """Build the engine of a finished checkpoint.

    Parameters
    ----------
    request
        The checkpoint, the engine's directory and the options.
    log
        Told what happens to the engine.
    scheduler
        "local", or the address of a cluster with a worker that has the resource `GPU`.

    Returns
    -------
    Built
        The engine, or `up_to_date` where it was there already.

    Raises
    ------
    BadInput
        Where the checkpoint, an option or the engine's directory is wrong.
    EngineFailed
        Where the builder fails or is missing.
    Interrupted
        On Ctrl-C. After each of these nothing is left of the engine but its log.
    """
    problems = check_checkpoint(request.checkpoint)
    if problems:
        raise BadInput(problems)
    engines = Engines((request,), log, scheduler, elsewhere="://" in scheduler)
    if not engines.elsewhere:  # an engine that is up to date, or cannot be built here, needs no cluster
        engines.prepare()
        if engines.complete(request):
            return Built(request.engine, up_to_date=True)
    with runner(scheduler, max(gpus(), 1), _local_resources(engines)) as session:
        return engines.build(session)[0]


def convert_and_build(
    plan: Plan,
    requests: Sequence[EngineRequest],
    listener: Listener | None,
    log: BuildLog,
    started: float | None = None,
    watch: RunWatch | None = None,
) -> Result:
    """Convert, and build each target's engine when its checkpoint is whole, in one graph.

    `started`: when the command began, by time.perf_counter(). `watch`: what the run is shown by. Raises what `execute` and
    `build_engine` raise.
    """
    engines = _engines(plan, requests, log)
    if not engines.elsewhere:
        engines.prepare()
        if plan.up_to_date and all(map(engines.complete, requests)):
            done = tuple(Built(request.engine, up_to_date=True) for request in requests)
            return replace(execute(plan, listener, started=started), engines=done)
    watch = watch or RunWatch()
    with open_session(plan, watch, _local_resources(engines)) as session:
        engines.prepare(session, wait=False)
        return execute(plan, listener, started=started, session=session, watch=watch, builds=engines)


def foreseen_engines(plan: Plan, requests: Sequence[EngineRequest]) -> list[tuple[list[Problem], str]]:
    """Look at what `convert` would find in the way of each engine: problems, and why no builder runs here, "" where one does.

    Of workers elsewhere no builder is asked.
    """
    looked = _engines(plan, requests, BuildLog(quiet=True)).look()
    return [(each.problems, lacking(each.without) if each.without else "") for each in looked]


def _engines(plan: Plan, requests: Sequence[EngineRequest], log: BuildLog) -> Engines:
    job = plan.job
    scheduler = str((job.cluster or {}).get("class") or job.scheduler)
    return Engines(requests, log, scheduler, overwrite=job.overwrite, elsewhere=job.elsewhere)


def _local_resources(engines: Engines) -> Mapping[str, float]:
    """The resources of the in-process worker: as many GPUs as builds may be at work at once, where there are none, too."""
    return {"GPU": max(gpus(), 1) if engines.share_gpus else 1}
