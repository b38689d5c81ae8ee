"""The commands `headrace convert` and `headrace plan`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.build import facts, sentence
from pipeline.cli.help import HelpCommand
from pipeline.cli.options import job_options
from pipeline.cli.shared import Json, LogFormat, Quiet
from pipeline.cli.typed import as_typed
from pipeline.engine.log import BuildLog
from pipeline.engine.requests import plan_requests
from pipeline.errors import BadInput, EngineFailed, Problem
from pipeline.planning.job import Job
from pipeline.printed import escaped
from pipeline.watching.progress import listener
from pipeline.watching.state import RunWatch

if TYPE_CHECKING:
    from pipeline.planning.engine_options import EngineRequest
    from pipeline.planning.plans import Plan

app = typer.Typer()

EXAMPLE = "headrace {} --model_dir Llama-3.1-8B --output_dir ranks --tp_size 2"


@app.command("convert", cls=HelpCommand, no_args_is_help=True, epilog=EXAMPLE.format("convert"))
@job_options
def convert_command(
    job: Job,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Convert a checkpoint into TensorRT-LLM ranks: config.json, rank{N}.safetensors and headrace.json.

    A job file's [engine] table has each target's engine built, too (see headrace build).

    Exit codes: 0 done or already up to date, 2 bad request or bad source (nothing written), 3 interrupted, 4 no engine, 1 a bug.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # first, as planning may fetch a model
    _import_numpy()
    from pipeline.planning.make_plan import make_plan
    from pipeline.run.execute import execute

    started, watch = time.perf_counter(), RunWatch()
    plan = make_plan(job, download=True)
    progress = listener(quiet, log_format, watch)
    engines = plan_requests(plan)
    if engines:
        from pipeline.engine.run import convert_and_build

        result = convert_and_build(plan, engines, progress, BuildLog(quiet, log_format), started, watch)
    else:
        result = execute(plan, progress, started=started, watch=watch)
    if quiet:
        return
    if log_format == "json":
        finished = {
            "event": "finished",
            "outputs": [str(path) for path in result.outputs],
            "bytes_read": result.bytes_read,
            "scratch_bytes_read": result.scratch_bytes_read,
            "bytes_written": result.bytes_written,
            "scratch_bytes_written": result.scratch_bytes_written,
            "seconds": round(result.seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
            "up_to_date": result.up_to_date,
            "stages": result.stages,
            **({"engines": [facts(built) for built in result.engines]} if engines else {}),
        }
        print(json.dumps(finished), file=sys.stderr)
        return
    from pipeline.reporting.plan_tables import result_table
    from pipeline.reporting.terminal import console

    if result.up_to_date:
        places = ", ".join(str(target.output.directory) for target in plan.targets)
        print(escaped(as_typed(f"{places} is up to date: nothing to do")))
    else:
        console().print(result_table(plan, result, as_typed))
    for built in result.engines:
        print(escaped(as_typed(sentence(built))))


@app.command("plan", cls=HelpCommand, no_args_is_help=True, epilog=EXAMPLE.format("plan"))
@job_options
def plan_command(
    job: Job,
    json_: Json = False,
    graph: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plan's graph into a file named *.svg, *.html or *.dot.")
    ] = None,
) -> None:
    """Say what convert would do with the same arguments; writes nothing but the picture that --graph asks for.

    Workers of a cluster that is there are asked what they see, with files that are there for that moment; for engines that are
    built here the builder is asked for its options.

    Exit codes: those of convert, as far as it can be known without converting: 0 it would work or has nothing to do, 2 it would be
    refused, as for a disk without room, another conversion in its place, or a bad request, 4 no builder for its engine is here.
    """
    if graph:
        from pipeline.reporting.graph_drawing import check_graph_path, draw_graph

        check_graph_path(graph)
    _import_numpy()
    from pipeline.planning.make_plan import make_plan
    from pipeline.run.foresee import foresee

    plan = make_plan(job)
    if job.elsewhere:
        from pipeline.run.workers import foreseen

        plan = foreseen(plan)
    if graph:
        draw_graph(plan.graph(), graph)
    engines = _engines(plan)
    outlook = foresee(plan)
    summary = plan.summary()
    entries: list[dict[str, Any]] = [
        {
            "path": str(request.engine),
            "command": request.command(),
            "obstacles": [*map(str, problems), *([without] if without else [])],
        }
        for request, problems, without in engines
    ]
    if json_:
        estimate = None if outlook.seconds is None else round(outlook.seconds, 1)
        more = {"done_tasks": outlook.done_tasks, "estimated_seconds": estimate, **({"engines": entries} if entries else {})}
        print(json.dumps({**summary, **more}, indent=2))
    else:
        from pipeline.reporting.plan_tables import plan_table
        from pipeline.reporting.terminal import console

        obstacles = list(dict.fromkeys(text for entry in entries for text in entry["obstacles"]))
        console().print(plan_table(plan, outlook, as_typed, obstacles))
        for entry in entries:
            print(f"then {escaped(shlex.join(entry['command']))}")
    if summary["obstacles"] or any(problems for _, problems, _ in engines):
        raise typer.Exit(BadInput.exit_code)
    if any(without for _, _, without in engines):
        raise typer.Exit(EngineFailed.exit_code)


def _engines(plan: Plan) -> list[tuple[EngineRequest, list[Problem], str]]:
    """The engines that a plan's job asks for: for each, what is in its way, and why no builder runs here, "" where one does."""
    requests = plan_requests(plan)
    if not requests:
        return []
    from pipeline.engine.run import foreseen_engines

    return [(request, *found) for request, found in zip(requests, foreseen_engines(plan, requests), strict=True)]


def _import_numpy() -> None:
    """Import NumPy without the threads of OpenBLAS: nothing here uses them, and starting them takes processor time."""
    name = "OPENBLAS_NUM_THREADS"
    user_set_it = name in os.environ
    os.environ.setdefault(name, "1")
    import numpy  # noqa: F401

    if not user_set_it:  # processes that are started later, such as an engine's builder, must not inherit it
        del os.environ[name]
