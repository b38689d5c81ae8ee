"""The commands `headrace batch`, `headrace jobs` and `headrace gc`: many conversions, and the store that records them."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from pipeline.cli.options import Json, LogFormat, nvidia_options
from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.jobs.events import Hub
from pipeline.jobs.log import Log
from pipeline.jobs.rows import STATES
from pipeline.planning.nvidia_flags import Understood

if TYPE_CHECKING:
    from pipeline.jobs.requests import Asked
    from pipeline.jobs.runner import Runner
    from pipeline.jobs.store import JobStore

app = typer.Typer()
jobs_app = typer.Typer(help="List the jobs of a store, look at one, cancel or retry one.")

StorePath = Annotated[
    Path | None, typer.Option("--store", help="The jobs' database; default: $XDG_STATE_HOME/headrace/jobs.db.", show_default=False)
]
JobNumber = Annotated[int, typer.Argument(help="The number of a job, as `headrace jobs` lists it.")]
LISTED = "Values of that option in the matrix, with commas between."


@contextmanager
def opened(path: Path | None, create: bool = True) -> Iterator[JobStore]:
    """Open the jobs' store at `path` (None: the default place), yield it, and close it at the end.

    Without `create`, a store that `path` names must exist, and jobs whose processes are gone are marked as ended. Raises BadInput
    where it does not exist or a package is missing, and WriteFailed (exit code 3) where the database fails while it is open.
    """
    if path and not create and not path.exists():
        raise BadInput([Problem(f"--store {path}", "no such file", "a store that `headrace batch` or `headrace serve` has made")])
    try:
        import sqlalchemy as sa

        from pipeline.jobs.recovery import recover
        from pipeline.jobs.store import open_store
    except ModuleNotFoundError as error:
        problem = Problem("headrace[jobs]", f"no package {error.name}", "it installed", "Run pip install 'headrace[jobs]'")
        raise BadInput([problem]) from None
    store = open_store(path)
    try:
        if not create:
            recover(store)
        yield store
    except sa.exc.DatabaseError as error:
        raise WriteFailed(f"{store.path}: {error.orig}") from error
    finally:
        store.close()


def stop_in_order(stop: threading.Event, runner: Runner) -> None:
    """Have Ctrl-C and SIGTERM set `stop`, so that running jobs are interrupted cleanly; a second signal stops them at once."""

    def handle(*_: object) -> None:
        if stop.is_set():
            runner.stop_seconds = 0.0
        stop.set()
        runner.wake.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@app.command("batch", no_args_is_help=True)
@nvidia_options
def batch_command(
    nvidia: Understood,
    names: Annotated[
        list[str] | None, typer.Argument(help="Batch files, job files, directories of them, patterns.", show_default=False)
    ] = None,
    model_dir: Annotated[
        list[str] | None, typer.Option("--model_dir", help="A matrix of jobs: its checkpoints; may be given often.")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Its directories, such as 'ranks/{model}-tp{tp_size}-{dtype}'.")
    ] = None,
    tp_size: Annotated[str | None, typer.Option("--tp_size", help=LISTED)] = None,
    pp_size: Annotated[str | None, typer.Option("--pp_size", help=LISTED)] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help=LISTED)] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", help=LISTED)] = None,
    max_jobs: Annotated[
        int | None, typer.Option("--max_jobs", min=1, help="Conversions at a time; default: one for eight cores.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max_memory", help="Memory of all together, as 8GiB; default: 4/5 of the machine's.")
    ] = None,
    scratch: Annotated[str | None, typer.Option(help="Directory or URL for the cuts of jobs that name none.")] = None,
    keep_scratch: Annotated[bool, typer.Option("--keep_scratch", help="Keep cuts after success.")] = False,
    attempts: Annotated[int | None, typer.Option(min=1, help="How often to try what may pass; default: 4.")] = None,
    summary: Annotated[Path | None, typer.Option(help="File for the summary, as JSON.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Say what would be done, in which order; do nothing.")] = False,
    store: StorePath = None,
    json_: Json = False,
    log_format: LogFormat = "text",
) -> None:
    """Convert many checkpoints: each source is read once, what fails does not stop the rest, what is done is not done again.

    Exit codes: 0 all done or up to date, otherwise the worst job's: 1 a bug, 2 bad input, 3 interrupted or failed half-way.
    """
    from pipeline.jobs import report
    from pipeline.jobs.units import make_units

    lists = {"tp_size": tp_size, "pp_size": pp_size, "dtype": dtype, "quantization": quantization}
    matrix = {"model_dir": model_dir, "output_dir": output_dir, **{name: _values(name, text) for name, text in lists.items()}}
    matrix |= nvidia.options
    requested = _requested_jobs(names or [], {name: value for name, value in matrix.items() if value})
    memory = _bytes(max_memory) or requested.settings.max_memory
    chosen = {"scratch": scratch, "keep_scratch": keep_scratch or None}
    units = make_units([request.given(chosen, Path.cwd()) for request in requested.requests], memory)
    if dry_run:
        _show([report.unit(each) for each in units], json_, "units_table")
        return
    with opened(store) as jobs_store:
        from pipeline.jobs.batch import Batch
        from pipeline.jobs.limits import Limits

        hub, stop = Hub(), threading.Event()
        hub.subscribe(Log(sys.stderr, log_format))
        retry = requested.settings.retry.model_copy(update={"attempts": attempts} if attempts else {})
        batch = Batch(jobs_store, hub, units, Limits.of(max_jobs or requested.settings.max_jobs, memory), retry)
        stop_in_order(stop, batch.runner)
        result = batch.run(stop)
    if summary:
        from pipeline.jobs.files import write_json

        write_json(summary, result.as_json())
    _show(result.as_json(), json_, "summary_table")
    raise typer.Exit(result.exit_code)


@app.command("gc")
def gc_command(
    failed_scratch_days: Annotated[
        float, typer.Option("--failed_scratch_days", min=0, help="How long scratch of failed runs is kept.")
    ] = 7.0,
    record_days: Annotated[float, typer.Option("--record_days", min=0, help="How long ended runs are remembered.")] = 90.0,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Say what would be removed; remove nothing.")] = False,
    store: StorePath = None,
    json_: Json = False,
) -> None:
    """Remove scratch that runs left long ago, and what the store says of runs that ended long ago; never an output."""
    with opened(store, create=False) as jobs_store:
        from pipeline.jobs.retention import Retention, collect

        retention = Retention(failed_scratch_days=failed_scratch_days, record_days=record_days)
        collected = collect(jobs_store, retention, dry_run)
    _show({"scratch": list(collected.scratch), "runs": collected.runs, "dry_run": dry_run}, json_, "collected_table")


@jobs_app.callback(invoke_without_command=True)
def jobs_command(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only those in a state, such as failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    store: StorePath = None,
    json_: Json = False,
) -> None:
    """List jobs, the one that something happened to last first."""
    context.obj = store
    if context.invoked_subcommand is not None:
        return
    with opened(store, create=False) as jobs_store:
        known = next((each for each in STATES if each == state), None)
        if state and known is None:
            raise BadInput([Problem("--state", state, f"one of {', '.join(STATES)}")])
        rows = [asdict(row) for row in jobs_store.jobs(known, limit)]
    _show(rows, json_, "jobs_table")


@jobs_app.command("show")
def show_command(context: typer.Context, number: JobNumber, store: StorePath = None, json_: Json = False) -> None:
    """Show a job: its options, its runs and their attempts."""
    with opened(store or context.obj, create=False) as jobs_store:
        _show_job(jobs_store, number, json_)


@jobs_app.command("cancel")
def cancel_command(context: typer.Context, number: JobNumber, store: StorePath = None, json_: Json = False) -> None:
    """Cancel a job that waits or runs. What it has written stays: `retry` goes on from there."""
    with opened(store or context.obj, create=False) as jobs_store:
        jobs_store.cancel(number)
        _show_job(jobs_store, number, json_)


@jobs_app.command("retry")
def retry_command(context: typer.Context, number: JobNumber, store: StorePath = None, json_: Json = False) -> None:
    """Have `headrace serve` on this store do a job again; it waits where none is at work."""
    with opened(store or context.obj, create=False) as jobs_store:
        jobs_store.retry(number)
        _show_job(jobs_store, number, json_)


def _show_job(store: JobStore, number: int, as_json: bool) -> None:
    from pipeline.jobs import report

    _show(report.job(store, store.job(number)), as_json, "job_table")


def _requested_jobs(names: list[str], matrix: dict[str, Any]) -> Asked:
    """Return the jobs that the batch and job files ask for, and those of the matrix that the flags ask for."""
    from pipeline.jobs.requests import Asked, gather, of_matrix

    from_files = gather(names, Path.cwd())
    if not matrix:
        return from_files
    return Asked((*from_files.requests, *of_matrix(matrix, Path.cwd(), "--matrix")), from_files.settings)


def _values(name: str, text: str | None) -> list[Any]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    return [int(word) if word.isdigit() else word for word in words] if name.endswith("_size") else words


def _bytes(text: str | None) -> int | None:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text)) if text else None
    except ValidationError:
        raise BadInput([Problem("--max_memory", repr(text), "a size such as 8GiB")]) from None


def _show(facts: Any, as_json: bool, table: str) -> None:
    """Print facts as JSON, or as a table made by the function of pipeline.jobs.report named `table`."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from pipeline.jobs import report
    from pipeline.reporting.terminal import console

    console().print(getattr(report, table)(facts))
