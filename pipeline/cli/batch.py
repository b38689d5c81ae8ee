"""The command `headrace batch`: many conversions, on a cluster of this process or of several machines."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from pipeline.cli.help import HelpCommand
from pipeline.cli.many import missing_extra, show, stop_in_order
from pipeline.cli.options import nvidia_options
from pipeline.cli.shared import Json, LogFormat, Quiet
from pipeline.errors import BadInput, Problem
from pipeline.planning.cluster_table import cluster_problems
from pipeline.planning.listen import Listen, parse_listen
from pipeline.planning.nvidia_flags import Understood

if TYPE_CHECKING:
    from pipeline.jobs.log import Log
    from pipeline.jobs.requests import Asked
    from pipeline.jobs.units import Unit

app = typer.Typer()

LISTED = "Values of that option in the matrix, with commas between."


@app.command(
    "batch",
    cls=HelpCommand,
    no_args_is_help=True,
    epilog="headrace batch night.toml --dry_run",
)
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
    scheduler: Annotated[
        str | None, typer.Option(help="tcp:// or tls:// of a Dask cluster whose workers offer MEMORY; default: this process.")
    ] = None,
    max_jobs: Annotated[
        int | None, typer.Option("--max_jobs", min=1, help="Conversions at a time here; default: one for eight cores.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max_memory", help="Memory of all together, as 8GiB; default: 4/5 of the machine's.")
    ] = None,
    scratch: Annotated[str | None, typer.Option(help="Directory or URL for the cuts of jobs that name none.")] = None,
    keep_scratch: Annotated[bool, typer.Option("--keep_scratch", help="Keep cuts after success.")] = False,
    attempts: Annotated[int | None, typer.Option(min=1, help="How often to try what may pass; default: 4.")] = None,
    settle: Annotated[float, typer.Option(min=0, help="Leave sources of which a file is younger, in seconds.")] = 0.0,
    summary: Annotated[Path | None, typer.Option(help="File for the summary, as JSON.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="File for Prometheus' textfile collector, kept up to date.")] = None,
    write_jobs: Annotated[
        Path | None, typer.Option("--write_jobs", help="Write a job file for each conversion into a directory; convert nothing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Say what would be done, in which order; do nothing.")] = False,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT of the page and Dask's dashboard.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
    log_format: LogFormat = "text",
) -> None:
    """Convert many checkpoints: each source is read once, what fails does not stop the rest, what is done is not done again.

    Exit codes: 0 all done or up to date, otherwise the worst job's: 1 a bug, 2 bad input, 4 no engine, 3 interrupted or failed
    half-way.
    """
    try:
        from pipeline.jobs.batch import planned
        from pipeline.jobs.files import check_writable, write_json
        from pipeline.jobs.log import Log
        from pipeline.jobs.units import make_units
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    lists = {"tp_size": tp_size, "pp_size": pp_size, "dtype": dtype, "quantization": quantization}
    matrix = {"model_dir": model_dir, "output_dir": output_dir, **{name: _values(name, text) for name, text in lists.items()}}
    matrix |= nvidia.options
    asked = _asked(names or [], {name: value for name, value in matrix.items() if value})
    memory = _bytes(max_memory) or asked.settings.max_memory
    where = _address(listen)
    address, named = scheduler or asked.settings.scheduler, asked.settings.cluster
    if scheduler and named and named.get("class"):
        named = None  # the flag overrides it; certificates are for any scheduler
    if problems := cluster_problems(named, address):
        raise BadInput(problems)
    chosen = {"scratch": scratch, "keep_scratch": keep_scratch or None}
    units = make_units([request.given(chosen, Path.cwd()) for request in asked.requests], memory, settle)
    if dry_run or write_jobs:
        result = planned(units, _write_jobs(write_jobs, units) if write_jobs and not dry_run else {})
        show(result, json_, "planned_table")
    else:
        retry = asked.settings.retry.model_copy(update={"attempts": attempts} if attempts else {})
        jobs = max_jobs or asked.settings.max_jobs
        if summary:
            check_writable(f"--summary {summary}", summary)
        log = Log(sys.stderr, log_format, quiet or nvidia.quiet)
        result = _batch(units, (address, jobs, memory), named, retry, metrics, where, log)
        if json_ or not log.quiet:
            show(result, json_, "summary_table")
        else:
            for job in result["jobs"]:
                if job["error"]:
                    log.say("error", f"{job['name']}: {job['error']}")
        if summary:
            write_json(f"--summary {summary}", summary, result)
    raise typer.Exit(result["exit_code"])


def _batch(
    units: list[Unit],
    workers: tuple[str | None, int | None, int | None],
    named: Any,
    retry: Any,
    metrics: Path | None,
    listen: Listen | None,
    log: Log,
) -> dict[str, Any]:
    """Do the units, and return the summary."""
    from pipeline.jobs.batch import cluster, metrics_kept, shown, summary
    from pipeline.jobs.fleet import Fleet

    stop, started = threading.Event(), time.monotonic()
    stop_in_order(stop)
    if not any(unit.state == "to do" for unit in units):
        fleet = Fleet(None, retry)
        return summary(fleet, fleet.add(units, "batch"), time.monotonic() - started)
    with ExitStack() as stack:
        stack.enter_context(log.of_all())
        at_hand = stack.enter_context(cluster(*workers, listen=listen, named=named))
        fleet = Fleet(at_hand.client, retry)
        fleet.listeners.append(log)
        overview, page = stack.enter_context(shown(fleet, at_hand, listen))
        if not log.quiet:
            log.say("page", f"page {page}; Dask's dashboard {at_hand.dashboard}")
        if metrics:
            stack.enter_context(metrics_kept(metrics, overview))
        runs = fleet.add(units, "batch")
        fleet.work(stop, until_idle=True)
        overview.has_ended = True
        return summary(fleet, runs, time.monotonic() - started)


def _write_jobs(directory: Path, units: list[Unit]) -> dict[str, str]:
    """Write `NNN-name.toml` for each unit that is to be done, in the order of their numbers; their paths by the units' names."""
    from pipeline.jobs.files import write_job

    written = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number, unit in enumerate(each for each in units if each.state == "to do"):
            name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in unit.name)
            written[unit.name] = str(directory / f"{number:03}-{name}.toml")
            write_job(Path(written[unit.name]), unit.options)
    except OSError as error:
        raise BadInput([Problem(f"--write_jobs {directory}", str(error), "a directory that can be written")]) from None
    return written


def _asked(names: list[str], matrix: dict[str, Any]) -> Asked:
    """Return the jobs that the batch and job files ask for, and those of the matrix that the flags ask for."""
    from pipeline.jobs.requests import Asked, gather, of_matrix

    problems = _unfinished(matrix, bool(names)) if matrix else []
    try:
        from_files = gather(names, Path.cwd())
    except BadInput as error:
        raise BadInput([*error.problems, *problems]) from None
    if problems:
        raise BadInput(problems)
    if not matrix:
        return from_files
    return Asked((*from_files.requests, *of_matrix(matrix, Path.cwd(), "--matrix")), from_files.settings)


def _unfinished(matrix: dict[str, Any], beside_files: bool) -> list[Problem]:
    """The problem of flags that make no matrix, as it has no sources or no place: they are not for the jobs of files."""
    missing = [f"--{name}" for name in ("model_dir", "output_dir") if name not in matrix]
    if not missing:
        return []
    given = " ".join(f"--{name}" for name in matrix if name != "expect") or "flags of the model's shape"
    remedy = "They do not change job files: write the options into these" if beside_files else ""
    return [Problem(given, f"no {' and '.join(missing)} beside it", "both, as flags make a matrix", remedy)]


def _values(name: str, text: str | None) -> list[Any]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    return [int(word) if word.isdigit() else word for word in words] if name.endswith("_size") else words


def _bytes(text: str | None) -> int | None:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text)) if text else None
    except ValidationError:
        raise BadInput([Problem("--max_memory", repr(text), "a size such as 8GiB")]) from None


def _address(text: str | None) -> Listen | None:
    try:
        return parse_listen(text) if text else None
    except ValueError as error:
        raise BadInput([Problem("--listen", repr(text), str(error))]) from None
