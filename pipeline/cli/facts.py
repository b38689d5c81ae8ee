"""The commands `headrace inspect`, `headrace families` and `headrace formats`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipeline.cli.help import HelpCommand
from pipeline.cli.shared import Json

app = typer.Typer()


@app.command("inspect", cls=HelpCommand, no_args_is_help=True, epilog="headrace inspect Llama-3.1-8B")
def inspect_command(
    model_dir: Annotated[str, typer.Argument(help="A checkpoint directory, a GGUF file, or org/name on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    json_: Json = False,
) -> None:
    """Say what a checkpoint is: source, family, size, quantization, ties, shards, and the parallel sizes that it can be cut to."""
    from pipeline.planning.inspection import inspect_source

    _show(inspect_source(model_dir, revision), json_, "source_table")


@app.command("families", cls=HelpCommand, epilog="headrace families")
def families_command(json_: Json = False) -> None:
    """List the model families that headrace converts."""
    from pipeline.planning.family_table import list_families, list_texts

    _show(list_families(), json_, "families_table", list_texts())


@app.command("formats", cls=HelpCommand, epilog="headrace formats --json")
def formats_command(json_: Json = False) -> None:
    """List the kinds of checkpoint that headrace reads, and the quantized formats that it unpacks."""
    from pipeline.planning.inspection import list_formats

    _show(list_formats(), json_, "formats_table")


def _show(facts: Any, as_json: bool, table: str, *more: Any) -> None:
    """Print facts as JSON, or as a table of them, and of `more`, by the function of pipeline.reporting.terminal named `table`."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from pipeline.reporting import terminal as report

    report.console().print(getattr(report, table)(facts, *more))
