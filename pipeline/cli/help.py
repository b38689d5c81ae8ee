"""Help pages as plain text: options in groups, no name or choice ever cut, and an example of each command.

An option's words stand beside its name where that is short, else beneath it. Nothing in them is markup. Rich is not imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

NARROWEST, WIDEST = 40, 120  # characters of a line
OPTIONS, ARGUMENTS, COMMANDS = "Options", "Arguments", "Commands"
OPPOSITES = "An option without a value has an opposite, --no_NAME, for what a job file says."
# By the type's name, which some versions of Typer take from Python and some from Click.
METAVARS = {"int": "N", "integer": "N", "integer range": "N", "float": "X", "float range": "X", "Path": "PATH", "path": "PATH"}


class HelpCommand(TyperCommand):
    """A command whose help is a page of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        formatter.write("\n".join(_page(self, ctx)) + "\n")


class HelpGroup(TyperGroup):
    """A group of commands whose help is a page of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        formatter.write("\n".join(_page(self, ctx)) + "\n")


def width() -> int:
    """The characters of a line: the terminal's, within bounds."""
    return min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)


def heading(text: str) -> str:
    """A heading, bold on a terminal."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def rows(pairs: Iterable[tuple[str, str]], columns: int, names: Iterable[str] = ()) -> Iterator[str]:
    """Lines of names and what they are, in two columns; a long name has its words beneath it.

    `names`: those of other rows that the columns are to be level with.
    """
    pairs = list(pairs)
    left = min(max((len(name) for name in (*names, *(name for name, _ in pairs))), default=0), max(columns // 3, 24)) + 4
    for name, words in pairs:
        lines = textwrap.wrap(words, columns - left, break_long_words=False, break_on_hyphens=False) or [""]
        beside = len(name) + 4 <= left
        yield f"  {name:<{left - 2}}{lines[0]}".rstrip() if beside else f"  {name}"
        yield from (f"{'':{left}}{line}" for line in lines[1 if beside else 0 :])


def _page(command: Any, ctx: Any) -> Iterator[str]:
    columns = width()
    arguments = [param for param in command.params if param.param_type_name == "argument" and not getattr(param, "hidden", False)]
    usage = [ctx.command_path, "[OPTIONS]", *map(_in_usage, arguments)]
    if command.options_metavar not in (None, "[OPTIONS]"):
        usage[1] = command.options_metavar
    yield f"{heading('Usage:')} {' '.join([*usage, *(['COMMAND'] if isinstance(command, TyperGroup) else [])])}"
    for paragraph in (command.help or "").split("\n\n"):
        yield ""
        yield from textwrap.wrap(" ".join(paragraph.split()), columns, break_long_words=False, break_on_hyphens=False)
    if command.epilog:
        lines = command.epilog.strip("\n").splitlines()
        yield from ("", heading("Example:" if len(lines) == 1 else "Examples:"), *(f"  {line}" for line in lines))
    if isinstance(command, TyperGroup):
        listed = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
        shown = [(name, each) for name, each in listed if each is not None and not each.hidden]
        for panel, some in _grouped((getattr(each, "rich_help_panel", None), (name, _first(each))) for name, each in shown):
            yield from ("", heading(f"{panel or COMMANDS}:"), *rows(some, columns))
    described = [(_name(param), text) for param in arguments if (text := _words(param))]
    if described:
        yield from ("", heading(f"{ARGUMENTS}:"), *rows(described, columns))
    options = [each for each in command.get_params(ctx) if each.param_type_name == "option" and not each.hidden]
    names = [_name(each) for each in options]
    for panel, some in _grouped((getattr(each, "rich_help_panel", None), (_name(each), _words(each))) for each in options):
        yield from ("", heading(f"{panel or OPTIONS}:"), *rows(some, columns, names))
    if any(each.secondary_opts for each in options):
        yield from ("", *textwrap.wrap(OPPOSITES, columns))


def _grouped(rows_of: Iterable[tuple[Any, tuple[str, str]]]) -> list[tuple[Any, list[tuple[str, str]]]]:
    """Rows by their group: groups in the order of their first rows, those without one last."""
    groups: dict[Any, list[tuple[str, str]]] = {}
    for group, row in rows_of:
        groups.setdefault(group if isinstance(group, str) else None, []).append(row)
    return sorted(groups.items(), key=lambda item: item[0] is None)


def _first(command: Any) -> str:
    """The first paragraph of a command's help."""
    return " ".join((command.short_help or command.help or "").split("\n\n")[0].split())


def _in_usage(param: Any) -> str:
    name = f"{_name(param)}{'...' if param.nargs == -1 else ''}"
    return name if param.required else f"[{name}]"


def _name(param: Any) -> str:
    """`--flag VALUE` of an option, `VALUE` of an argument."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    flags = ", ".join(sorted(param.opts, key=lambda flag: not flag.startswith("--")))
    return flags if param.is_flag or param.name == "help" else f"{flags} {param.metavar or _metavar(param)}"


def _kind(param: Any) -> Any:
    """The object that says what a parameter's values are."""
    return getattr(param, "type_descriptor", None) or param.type


def _metavar(param: Any) -> str:
    kind = _kind(param)
    name = getattr(kind, "name", None) or getattr(getattr(kind, "annotation", None), "__name__", "")
    return "NAME" if getattr(kind, "choices", None) else METAVARS.get(str(name), "TEXT")


def _words(param: Any) -> str:
    """The words on a parameter: its help, its choices, and its default, where it has one that people would write."""
    text = (getattr(param, "help", None) or "").replace("\\[", "[")
    choices = getattr(_kind(param), "choices", None)
    said = [f"Choices: {', '.join(map(str, choices))}."] if choices else []
    default = param.default
    if getattr(param, "show_default", False) and isinstance(default, str | int | float) and default not in (False, ""):
        said.append(f"Default: {default}.")
    return " ".join([text, *said]).strip()
