"""Command-line flags: one for each field of Job, and those that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic.types import ByteSize

from pipeline.errors import BadInput, Problem
from pipeline.planning.job import Job, make_job
from pipeline.planning.nvidia_flags import nvidia_flags, understood

Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
LogFormat = Annotated[Literal["text", "json"], typer.Option("--log_format", help="Progress as text or as JSON lines.")]
JOB_FILE = typer.Argument(help="A TOML file of these options; flags override it.", show_default=False)


NVIDIA_PANEL = "Flags of NVIDIA's scripts"
SHORT = {"smoothquant": ("-sq",)}  # more spellings of flags, as NVIDIA's scripts have them
TAKES = {"nothing": bool, "integer": int, "number": float, "text": str}


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate `command(job, **its own options)`: add a flag for each field of Job, and pass the Job made of those given.

    NVIDIA's other flags are there too; those that say how much to print become the command's own `quiet`.
    """

    def run(file: Path | None, **values: Any) -> None:
        given = taken(values)
        own = {name: values.pop(name) for name in list(values) if name not in Job.model_fields}
        options = {name: value for name, value in values.items() if value is not None}
        known = understood(given, options)
        if "quiet" in own:
            own["quiet"] = own["quiet"] or known.quiet
        command(_job({**options, **known.options}, file, known.problems), **own)

    own = list(inspect.signature(command).parameters.values())[1:]
    hints = inspect.get_annotations(command, eval_str=True)
    file_type: Any = Annotated[Path | None, JOB_FILE]
    parameters = [inspect.Parameter("file", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=file_type, default=None)]
    for name in sorted(set(Job.model_fields) - {"target", "engine", "expect", "scratch_outputs", "cluster"}, key=_order):
        field = Job.model_fields[name]
        annotation: Any = Annotated[_flag_type(field), _option(name, field)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None))
    parameters += nvidia_parameters()
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]) for parameter in own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def nvidia_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate `command(nvidia, **its own options)`: add NVIDIA's other flags, and pass the meaning of those given as `nvidia`."""
    signature = inspect.signature(command)
    hints = inspect.get_annotations(command, eval_str=True)

    def run(**values: Any) -> None:
        known = understood(taken(values), {name: value for name, value in values.items() if value is not None})
        if known.problems:
            raise BadInput(known.problems)
        command(known, **values)

    own = list(signature.parameters.values())[1:]
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    run.__signature__ = signature.replace(parameters=[*parameters, *nvidia_parameters()])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *nvidia_parameters()]}
    run.__doc__ = command.__doc__
    return run


def nvidia_parameters() -> list[inspect.Parameter]:
    """A keyword for each of NVIDIA's other flags; those that are refused are not in the help."""
    parameters = []
    for flag in nvidia_flags().values():
        meaning = (
            f"Another name of --{flag.becomes}."
            if flag.becomes
            else flag.help or f"Refused unless the model has this {flag.expects}."
        )
        option = typer.Option(
            f"--{flag.name}", *flag.words, help=meaning, show_default=False, rich_help_panel=NVIDIA_PANEL, hidden=bool(flag.refused)
        )
        annotation: Any = Annotated[TAKES[flag.takes] | None, option]
        parameters.append(inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None))
    return parameters


def taken(values: dict[str, Any]) -> dict[str, Any]:
    """Take NVIDIA's other flags out of `values`, and return those that were given."""
    own = {name: values.pop(name) for name in nvidia_flags()}
    return {name: value for name, value in own.items() if value is not None}


def _job(options: Mapping[str, Any], file: Path | None, problems: Sequence[Problem]) -> Job:
    """The job of these options. Raises BadInput with `problems` and the options' own."""
    try:
        job = make_job(options, file)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    return job


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
    return typer.Option(flags, *SHORT.get(name, ()), help=f"{field.description}{choices}{default}", show_default=False)


def _shown(value: Any) -> str:
    return value.human_readable() if isinstance(value, ByteSize) else str(value)
