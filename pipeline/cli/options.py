"""Command-line flags: one for each field of Job, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic.types import ByteSize

from pipeline.planning.job import Job, make_job

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
LogFormat = Annotated[Literal["text", "json"], typer.Option("--log_format", help="Progress as text or as JSON lines.")]
JOB_FILE = typer.Argument(help="A TOML file of these options; flags override it.", show_default=False)


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate `command(job, **its own options)`: add a flag for each field of Job, and pass the Job made of those given."""

    def run(file: Path | None, **values: Any) -> None:
        own = {name: values.pop(name) for name in list(values) if name not in Job.model_fields}
        command(make_job({name: value for name, value in values.items() if value is not None}, file), **own)

    own = list(inspect.signature(command).parameters.values())[1:]
    hints = inspect.get_annotations(command, eval_str=True)
    file_type: Any = Annotated[Path | None, JOB_FILE]
    parameters = [inspect.Parameter("file", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=file_type, default=None)]
    for name in sorted(set(Job.model_fields) - {"target", "engine"}, key=_order):
        field = Job.model_fields[name]
        annotation: Any = Annotated[_flag_type(field), _option(name, field)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None))
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]) for parameter in own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def _order(name: str) -> tuple[bool, int]:
    """Return a sort key for the help text: source and output come first, then the order of Job's fields."""
    first = name in ("model_dir", "meta_ckpt_dir", "quant_ckpt_path", "revision", "output_dir")
    return not first, list(Job.model_fields).index(name)


def _flag_type(field: FieldInfo) -> Any:
    """Return the type that the command line parses a field's value as; Job itself validates it."""
    kind = field.annotation
    if kind is bool:
        return bool | None
    numbers = get_origin(kind) is Literal and all(isinstance(choice, int) for choice in get_args(kind))
    return int | None if numbers or (kind is int and kind is not ByteSize) else str | None


def _option(name: str, field: FieldInfo) -> Any:
    # An unescaped bracket would be taken for rich's markup, and not printed.
    choices = f" \\[{'|'.join(map(str, get_args(field.annotation)))}]" if get_origin(field.annotation) is Literal else ""
    default = "" if field.is_required() or field.annotation is bool else f" \\[default: {_shown(field.default)}]"
    flags = f"--{name}/--no_{name}" if field.annotation is bool else f"--{name}"
    return typer.Option(flags, help=f"{field.description}{choices}{default}", show_default=False)


def _shown(value: Any) -> str:
    return value.human_readable() if isinstance(value, ByteSize) else str(value)
