"""The commands by name: the module that has each, and the words that the list of commands says of it.

A module is imported when its command is called or asked for its help, so that no command waits for the flags of all others.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from pipeline.cli.help import HelpGroup

# Name -> module of pipeline.cli, and the first paragraph of the command's own help, as the list of commands has it.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "convert": (
        "convert",
        "Convert a checkpoint into TensorRT-LLM ranks: config.json, rank{N}.safetensors and headrace.json.",
    ),
    "plan": (
        "convert",
        "Say what convert would do with the same arguments; writes nothing but the picture that --graph asks for.",
    ),
    "build": (
        "build",
        "Build the engines of a checkpoint with TensorRT-LLM's trtllm-build, whose own options go beside these.",
    ),
    "calibrate": (
        "calibrate",
        "Measure the largest activations of each linear, a layer at a time, for SmoothQuant, FP8 and 8-bit caches.",
    ),
    "inspect": (
        "facts",
        "Say what a checkpoint is: source, family, size, quantization, ties, shards, and the parallel sizes that it can be cut to.",
    ),
    "families": ("facts", "List the model families that headrace converts."),
    "formats": ("facts", "List the kinds of checkpoint that headrace reads, and the quantized formats that it unpacks."),
    "verify": (
        "verify",
        "Prove an output right without a GPU: headers and checksums, every value against the source, logits.",
    ),
    "generate": ("verify", "Continue a text with the converted ranks, on the CPU."),
    "report": (
        "report",
        "Make one HTML page of an output directory: where it comes from, what was done, sizes, errors by layer, what is wrong.",
    ),
    "batch": (
        "batch",
        "Convert many checkpoints: each source is read once, what fails does not stop the rest, what is done is not done again.",
    ),
    "serve": (
        "serve",
        "Convert by a schedule: at times of the calendar, every so often, and whatever arrives in a directory or an object store.",
    ),
    "unlock": (
        "unlock",
        "Release directories at which a process of another machine was at work, once you know that it is gone.",
    ),
    "scratch": ("scratch", "Look at or remove the Zarr scratch that jobs keep."),
    "jobs": ("jobs", "What `headrace serve` did and does: list jobs, look at one, cancel it or do it again."),
}


# The groups of the list, in its order.
PANELS: Mapping[str, tuple[str, ...]] = {
    "A conversion": ("inspect", "plan", "convert", "verify", "generate", "report"),
    "Before and after it": ("calibrate", "build"),
    "Many conversions": ("batch", "serve", "jobs"),
    "What headrace knows": ("families", "formats"),
    "What is left behind": ("scratch", "unlock"),
}


class LateGroup(HelpGroup):
    """All commands of COMMANDS, in the groups of PANELS. Where they are listed, each has its name and first words alone."""

    def __init__(self, **settings: Any) -> None:
        words = {
            name: TyperCommand(name, callback=None, help=COMMANDS[name][1], rich_help_panel=panel)
            for panel, names in PANELS.items()
            for name in names
        }
        super().__init__(**{**settings, "commands": words})
        self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command itself; None where there is none of that name."""
        return self.commands.get(cmd_name) if self._listing or cmd_name not in COMMANDS else load(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the list of commands."""
        with self._listed():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The names that a shell offers."""
        with self._listed():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _listed(self) -> Iterator[None]:
        self._listing = True
        try:
            yield
        finally:
            self._listing = False


@functools.cache
def load(name: str) -> Any:
    """The command itself, with its flags, or the group of that name: imports the module that has it."""
    app = importlib.import_module(f"pipeline.cli.{COMMANDS[name][0]}").app
    alone = typer.Typer(add_completion=False)
    alone.registered_commands = [command for command in app.registered_commands if command.name == name]
    if not alone.registered_commands:
        alone.add_typer(app, name=name)
    return typer.main.get_group(alone).commands[name]
