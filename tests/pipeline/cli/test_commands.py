"""Commands that are loaded when they are called: the list of them says what they say themselves, and loads none."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

import pipeline.cli
from pipeline.cli.commands import COMMANDS, PANELS, load
from tests.support.commands import headrace


def of_all_modules() -> set[str]:
    """The names of all commands and groups that a module of the command line has as `app`."""
    names = set()
    for module in pkgutil.iter_modules(pipeline.cli.__path__, "pipeline.cli."):
        app = None if module.name.endswith("__main__") else getattr(importlib.import_module(module.name), "app", None)
        if isinstance(app, typer.Typer):
            own = module.name.rpartition(".")[2]
            names |= {own} if app.info.help else {str(command.name) for command in app.registered_commands}
    return names


def test_every_command_is_listed() -> None:
    assert set(COMMANDS) == of_all_modules()
    assert sorted(name for names in PANELS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_its_help_begins_with(name: str) -> None:
    command = load(name)
    assert command.name == name
    assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name][1]


def test_a_group_has_its_commands() -> None:
    groups = {name: load(name) for name in COMMANDS if isinstance(load(name), TyperGroup)}
    assert {name: sorted(group.commands) for name, group in groups.items()} == {
        "scratch": ["ls", "rm"],
        "jobs": ["cancel", "list", "logs", "retry", "show"],
    }


def test_who_walks_the_commands_finds_them_whole() -> None:
    group: Any = typer.main.get_command(pipeline.cli.app)
    context = typer.Context(group)
    assert {name: group.get_command(context, name) for name in group.list_commands(context)} == {
        name: load(name) for name in COMMANDS
    }
    assert len(load("plan").params) > 20
    assert group.get_command(context, "plann") is None


def test_a_command_that_is_misspelt_is_named() -> None:
    ran = headrace("convrt")
    assert ran.code == 2
    assert "convert" in ran.err


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ("--help", set()),
        ("--version", set()),
        ("unlock --help", {"unlock"}),
        ("convert --help", {"build", "convert", "options", "shared"}),
    ],
)
def test_no_command_loads_those_of_others(words: str, loaded: set[str]) -> None:
    script = "import atexit, sys\natexit.register(lambda: print('loaded', *sys.modules))\nfrom pipeline.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", script, *words.split()], capture_output=True, text=True, check=True)
    modules = set(ran.stdout.splitlines()[-1].split())
    always = {f"pipeline.cli.{name}" for name in ("commands", "help", "limits", "streams", "typed", "usage")}
    assert {name for name in modules if name.startswith("pipeline.cli.")} - always == {f"pipeline.cli.{name}" for name in loaded}
    assert ("pipeline.planning.job" in modules) == ("options" in loaded)
