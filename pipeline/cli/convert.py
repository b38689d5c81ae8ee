"""`headrace convert` and `headrace plan`."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from pipeline.cli.options import Json, LogFormat, job_options
from pipeline.job import Job

app = typer.Typer()


@app.command("convert", no_args_is_help=True)
@job_options
def convert_command(
    job: Job,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
    log_format: LogFormat = "text",
) -> None:
    """Convert a checkpoint into TensorRT-LLM ranks: config.json, rank{N}.safetensors and headrace.json.

    Exit codes: 0 done or already up to date, 2 bad request or bad source (nothing written), 3 interrupted, 1 a bug.
    """
    import json
    import time

    from pipeline.execute import execute
    from pipeline.planning import make_plan
    from pipeline.progress import listener
    from pipeline.watching.state import Watch

    started, watch = time.perf_counter(), Watch()
    plan = make_plan(job, download=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = execute(plan, listener(quiet, log_format, watch), started=started, watch=watch)
    if quiet:
        return
    if log_format == "json":
        finished = {
            "event": "finished",
            "outputs": [str(path) for path in result.outputs],
            "bytes_read": result.bytes_read,
            "bytes_written": result.bytes_written,
            "seconds": round(result.seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
            "up_to_date": result.up_to_date,
            "stages": result.stages,
        }
        print(json.dumps(finished), file=sys.stderr)
        return
    from pipeline.report import console, result_table

    if result.up_to_date:
        print(f"{', '.join(str(target.output.directory) for target in plan.targets)} is up to date: nothing to do")
    else:
        console().print(result_table(plan, result))


@app.command("plan", no_args_is_help=True)
@job_options
def plan_command(job: Job, json_: Json = False) -> None:
    """Say what convert would do with the same arguments; writes nothing."""
    from pipeline.planning import make_plan

    plan = make_plan(job)
    if json_:
        import json

        print(json.dumps(plan.summary(), indent=2))
        return
    from pipeline.report import console, plan_table

    console().print(plan_table(plan))
