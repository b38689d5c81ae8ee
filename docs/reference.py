"""Pages of reference, written from the code: commands, files, the Python API.

`python docs/reference.py` writes them to docs/reference, as each build of the site does; git does not keep them.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

import headrace
from pipeline.cli import app
from pipeline.errors import HeadraceError
from pipeline.jobs.fleet import STALL_SECONDS
from pipeline.jobs.notify import Notify
from pipeline.jobs.requests import BatchFile
from pipeline.jobs.retry import Retry
from pipeline.jobs.schedule import Cron, Http, Interval, Schedule, Watch
from pipeline.planning.engine_options import EngineOptions
from pipeline.planning.job import Job
from pipeline.planning.target_options import TargetOptions

OPENING = "% Written by reference.py.\n\n"


def write_reference(folder: Path) -> None:
    """Write all pages into a folder; those that say what they said are left as they are, so that nothing is built anew for them."""
    folder.mkdir(exist_ok=True)
    for name, text in {"commands": commands(), "files": files(), "python": python(), "index": index()}.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def index() -> str:
    """The page above the others."""
    return OPENING + (
        "# Reference\n\nWritten from the code at each build.\n\n```{toctree}\n:maxdepth: 2\n\ncommands\nfiles\npython\n```\n"
    )


# Commands.


def commands() -> str:
    """Every command with its options, and the exit codes."""
    text = [OPENING, "# Commands\n\nIn names of options `-` and `_` are alike.\n\n## Exit codes\n\n", *exit_codes(), "\n"]
    for path, command in walk(typer.main.get_command(app), ("headrace",)):
        text += command_section(path, command)
    return "".join(text)


def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command of Click's, which Typer may carry with it under another name, and those below it, each with its words."""
    yield path, command
    if hasattr(command, "list_commands"):
        context = command.make_context(path[-1], [], resilient_parsing=True)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from walk(below, (*path, name))


def command_section(path: tuple[str, ...], command: Any) -> Iterator[str]:
    """What a command does, its arguments, and its options by panel."""
    if len(path) > 1:
        yield f"## `{' '.join(path)}`\n\n"
    yield f"{prose(command.help or '')}\n\n"
    if command.epilog:
        yield f"```sh\n{command.epilog}\n```\n\n"
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or _panel(parameter), []).append(parameter)
    for panel, parameters in panels.items():
        yield table((panel, ""), [(spelling(parameter), prose(getattr(parameter, "help", None) or "")) for parameter in parameters])


def _panel(parameter: Any) -> str:
    return "Arguments" if parameter.param_type_name == "argument" else "Options"


def spelling(parameter: Any) -> str:
    """How an option or argument is written."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag or parameter.count else f"{names} {_takes(parameter)}"


def _takes(parameter: Any) -> str:
    if parameter.metavar:
        return f"*{parameter.metavar.replace('|', ' or ')}*"
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", str)
    return _kind(kind) if get_origin(kind) is Literal else f"*{_kind(kind)}*"


def exit_codes() -> Iterator[str]:
    """The exit codes, of the errors' own words."""
    codes: dict[int, list[type[HeadraceError]]] = {}
    for error in [HeadraceError, *_below(HeadraceError)]:
        codes.setdefault(error.exit_code, []).append(error)
    rows = [("0", "Done, or nothing is to do.", "")]
    for code, errors in sorted(codes.items()):
        meaning = "A bug." if code == 1 else prose((inspect.getdoc(errors[0]) or "").split("\n\n")[0])
        rows.append((str(code), meaning, ", ".join(f"`{error.__name__}`" for error in errors)))
    yield table(("code", "meaning", "in Python"), rows)


def _below(error: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
    for below in error.__subclasses__():
        yield below
        yield from _below(below)


# Files.


def files() -> str:
    """The keys of job files, batch files and schedules."""
    parts = [
        OPENING,
        "# Job files, batch files, schedules\n\nTOML. Relative paths start from the file's folder.\n\n",
        "## A job file\n\nThe keys are the command line's flags; flags override them. Of one target they stand at the top; of"
        " several in `[[target]]` tables, for which those at the top are defaults.\n\n",
        fields(Job, but=set(TargetOptions.model_fields) - {"output_dir"}),
        "### A target: `[[target]]`\n\n",
        fields(TargetOptions),
        "### Engines: `[engine]`\n\nAnd every option of trtllm-build 1.2.1, by its name without dashes.\n\n",
        fields(EngineOptions),
        "## A batch file\n\nWhat `headrace batch` takes: [batches](../batches.md).\n\n",
        fields(BatchFile),
        "### Trying again: `[retry]`\n\n",
        fields(Retry),
        "## A schedule\n\nWhat `headrace serve` follows: [schedules](../scheduling.md). "
        f"A conversion that writes nothing for `stall_seconds` ({STALL_SECONDS:g}) counts as stalled.\n\n",
        fields(Schedule),
    ]
    for heading, model in (("cron", Cron), ("interval", Interval), ("watch", Watch)):
        parts += [f"### `[[{heading}]]`\n\n{prose(inspect.getdoc(model) or '')}\n\n", fields(model)]
    for heading, model in (("http", Http), ("notify", Notify)):
        parts += [f"### `[{heading}]`\n\n{prose(inspect.getdoc(model) or '')}\n\n", fields(model)]
    return "".join(parts)


def fields(model: type[BaseModel], but: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    """A table of a model's fields."""
    rows = [
        (f"`{name}`", _kind(field.annotation), _default(field), prose(field.description or ""))
        for name, field in model.model_fields.items()
        if name not in but
    ]
    return table(("key", "type", "default", ""), rows)


NAMES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    ByteSize: "size, such as 2GiB",
    dict: "table",
}


def _kind(annotation: Any) -> str:
    """The type of a field in TOML's words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin in (tuple, list) or annotation is tuple:
        return f"list of {_kind(inner[0])}" if inner else "list"
    if origin is dict:
        return "table"
    if inner:  # a union
        return " or ".join(dict.fromkeys(_kind(kind) for kind in inner if kind is not type(None)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ((), {}) or isinstance(value, BaseModel):
        return ""
    return f"`{value.human_readable() if isinstance(value, ByteSize) else json.dumps(value, default=str)}`"


# Python.

FUNCTIONS = ("plan", "convert", "verify", "inspect", "report", "build")


def python() -> str:
    """The names of the Python API, with their docstrings."""
    loaders = [name for name in headrace.__all__ if name.startswith("load_from")]
    errors = [name for name in headrace.__all__ if isinstance(getattr(headrace, name), type) and _is_error(getattr(headrace, name))]
    named = {*FUNCTIONS, *loaders, *errors, "__version__"}
    options = [name for name in headrace.__all__ if name.endswith(("Options", "TargetTable"))]
    others = [name for name in headrace.__all__ if name not in named and name not in options]
    text = [OPENING, "# Python\n\n```{eval-rst}\n.. py:module:: headrace\n```\n\n"]
    for heading, kind, names in (
        ("Functions", "autofunction", [*FUNCTIONS]),
        ("Loaders", "autofunction", loaders),
        ("Classes", "autoclass", others),
        ("Errors", "autoexception", errors),
        ("Keywords as types", "autoclass", options),
    ):
        text.append(f"## {heading}\n\n```{{eval-rst}}\n")
        for name in names:
            text.append(f".. {kind}:: headrace.{name}{_parameters(name) if kind == 'autofunction' else ''}\n")
            if kind == "autoclass" and name not in options and name != "Job":
                text.append("   :members:\n")
            text.append("\n")
        text.append("```\n\n")
    return "".join(text)


def _parameters(name: str) -> str:
    """The parameters of a function, the many keywords of options as the one that they are."""
    signature = inspect.signature(getattr(headrace, name))
    own = [each for each in signature.parameters.values() if each.default is not ...]
    if len(own) == len(signature.parameters):
        return ""
    shown = signature.replace(parameters=[*own, inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])
    return str(shown).replace("'", "")


def _is_error(kind: type) -> bool:
    return issubclass(kind, BaseException)


# Markdown.


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines) + "\n"


def prose(text: str) -> str:
    """A help text as Markdown in one paragraph or several: without rich's escapes, and angle brackets as they are."""
    text = inspect.cleandoc(text).replace("\\[", "[").replace("\f", "").replace("\b", "")
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([<>*\[\]{}])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(?<!\n)\n(?!\n)", " ", "".join(parts))


if __name__ == "__main__":
    write_reference(Path(__file__).parent / "reference")
