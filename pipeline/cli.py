"""The command line: `headrace convert` and `headrace plan`.

The flags are the fields of Job, by NVIDIA's names; `-` and `_` are alike.
"""

from __future__ import annotations

import inspect
import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic.types import ByteSize

from pipeline.errors import HeadraceError
from pipeline.job import Job, make_job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stream LLaMA-family checkpoints into TensorRT-LLM ranks, out of core.",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("-", "_")},
)

JOB_FILE = typer.Argument(help="A TOML file of these options; flags override it.", show_default=False)


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(job, **its own options)` one flag for each field of Job; those given become a Job."""

    def run(file: Path | None, **values: Any) -> None:
        own = {name: values.pop(name) for name in list(values) if name not in Job.model_fields}
        command(make_job({name: value for name, value in values.items() if value is not None}, file), **own)

    own = list(inspect.signature(command).parameters.values())[1:]
    hints = inspect.get_annotations(command, eval_str=True)
    file_type: Any = Annotated[Path | None, JOB_FILE]
    parameters = [inspect.Parameter("file", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=file_type, default=None)]
    for name in sorted(set(Job.model_fields) - {"target"}, key=_order):
        field = Job.model_fields[name]
        annotation: Any = Annotated[_flag_type(field), _option(name, field)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None))
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]) for parameter in own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def _order(name: str) -> tuple[bool, int]:
    """Where a flag stands in the help: the two directories first."""
    return name not in ("model_dir", "meta_ckpt_dir", "quant_ckpt_path", "revision", "output_dir"), list(Job.model_fields).index(
        name
    )


def _flag_type(field: FieldInfo) -> Any:
    """What the command line takes for a field; Job itself does the checking."""
    kind = field.annotation
    if kind is bool:
        return bool | None
    numbers = get_origin(kind) is Literal and all(isinstance(choice, int) for choice in get_args(kind))
    return int | None if numbers or (kind is int and kind is not ByteSize) else str | None


def _option(name: str, field: FieldInfo) -> Any:
    choices = f" [{'|'.join(map(str, get_args(field.annotation)))}]" if get_origin(field.annotation) is Literal else ""
    default = "" if field.is_required() or field.annotation is bool else f" [default: {_shown(field.default)}]"
    flags = f"--{name}/--no_{name}" if field.annotation is bool else f"--{name}"
    return typer.Option(flags, help=f"{field.description}{choices}{default}", show_default=False)


def _shown(value: Any) -> str:
    return value.human_readable() if isinstance(value, ByteSize) else str(value)


@app.command("convert", no_args_is_help=True)
@job_options
def convert_command(
    job: Job,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
    log_format: Annotated[
        Literal["text", "json"], typer.Option("--log_format", help="Progress as text or as JSON lines.")
    ] = "text",
) -> None:
    """Convert a checkpoint into TensorRT-LLM ranks: config.json, rank{N}.safetensors and headrace.json.

    Exit codes: 0 done or already up to date, 2 bad request or bad source (nothing written), 3 interrupted, 1 a bug.
    """
    import json
    import time

    from pipeline.execute import execute
    from pipeline.planning import make_plan
    from pipeline.progress import listener

    started = time.perf_counter()
    plan = make_plan(job, download=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = execute(plan, listener(quiet, log_format), started=started)
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
def plan_command(job: Job, json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False) -> None:
    """Say what convert would do with the same arguments; writes nothing."""
    from pipeline.planning import make_plan

    plan = make_plan(job)
    if json_:
        import json

        print(json.dumps(plan.summary(), indent=2))
        return
    from pipeline.report import console, plan_table

    console().print(plan_table(plan))


Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


@app.command("inspect", no_args_is_help=True)
def inspect_command(
    model_dir: Annotated[str, typer.Argument(help="A checkpoint directory, a GGUF file, or org/name on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    json_: Json = False,
) -> None:
    """Say what a checkpoint is: source, family, size, quantization, ties, shards, and the parallel sizes that it can be cut to."""
    from pipeline.inspection import inspect_source

    _show(inspect_source(model_dir, revision), json_, "source_table")


@app.command("families")
def families_command(json_: Json = False) -> None:
    """List the model families that headrace converts."""
    from pipeline.inspection import list_families

    _show(list_families(), json_, "families_table")


@app.command("formats")
def formats_command(json_: Json = False) -> None:
    """List the kinds of checkpoint that headrace reads, and the quantized formats that it unpacks."""
    from pipeline.inspection import list_formats

    _show(list_formats(), json_, "formats_table")


def _show(facts: Any, as_json: bool, table: str) -> None:
    """Print facts as JSON, or as the table that pipeline.report makes of them."""
    if as_json:
        import json

        print(json.dumps(facts, indent=2))
        return
    from pipeline import report

    report.console().print(getattr(report, table)(facts))


scratch_app = typer.Typer(no_args_is_help=True, help="Look at or remove the Zarr scratch that jobs keep.")
app.add_typer(scratch_app, name="scratch")
ScratchRoot = Annotated[Path, typer.Argument(help="The scratch directory, as given to --scratch.")]


@scratch_app.command("ls")
def scratch_ls(root: ScratchRoot, json_: Json = False) -> None:
    """List the cuts in a scratch directory."""
    from pipeline.scratch import list_scratch

    found = list_scratch(root)
    if json_:
        import json

        rows = [
            {
                "path": str(cut.directory),
                "stage": cut.stage,
                "source": cut.source,
                "complete": cut.complete,
                "bytes": cut.size_bytes,
            }
            for cut in found
        ]
        print(json.dumps(rows, indent=2))
        return
    from pipeline.report import console, scratch_table

    console().print(scratch_table(found))


@scratch_app.command("rm")
def scratch_rm(
    root: ScratchRoot, names: Annotated[list[str] | None, typer.Argument(help="Cuts to remove; all where none is named.")] = None
) -> None:
    """Remove cuts; one that a job is at work on is refused."""
    from pipeline.scratch import remove_scratch

    for cut in remove_scratch(root, names or []):
        print(f"removed {cut.directory}")


def _say(error: HeadraceError) -> None:
    """An error on standard error, as JSON where the log is."""
    words = [word.replace("-", "_") for word in sys.argv]
    if "__log_format=json" not in words and ("__log_format", "json") not in itertools.pairwise(words):
        print(f"headrace: {error}", file=sys.stderr)
        return
    import json
    from dataclasses import asdict

    problems = [asdict(problem) for problem in getattr(error, "problems", ())]
    event = {"event": "error", "exit_code": error.exit_code, "message": str(error), "problems": problems}
    print(json.dumps(event), file=sys.stderr)


def main() -> None:
    """Run the command line; errors of ours become one report and their exit code, without a traceback."""
    try:
        app()
    except HeadraceError as error:
        _say(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("headrace: interrupted before anything was written", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
