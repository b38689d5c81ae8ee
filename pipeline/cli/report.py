"""The command `headrace report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.help import HelpCommand
from pipeline.cli.levels import levels
from pipeline.errors import VerificationFailed
from pipeline.printed import escaped
from pipeline.tensor.bucket import output_at

app = typer.Typer()


@app.command("report", cls=HelpCommand, no_args_is_help=True, epilog="headrace report ranks --output ranks.html")
def report_command(
    directory: Annotated[Path, typer.Argument(parser=output_at, metavar="OUT", help="A finished output.", show_default=False)],
    source: Annotated[
        str | None, typer.Option(help="What it was made of; default: what headrace.json names, if that is there, unchanged.")
    ] = None,
    quant_ckpt_path: Annotated[Path | None, typer.Option("--quant_ckpt_path", help="As given to convert.")] = None,
    output: Annotated[Path | None, typer.Option(help="The page, named *.html; default: OUT.report.html beside OUT.")] = None,
    verification: Annotated[
        Path | None, typer.Option(help="What `headrace verify --json` printed; by default the output is verified now.")
    ] = None,
) -> None:
    """Make one HTML page of an output directory: where it comes from, what was done, sizes, errors by layer, what is wrong.

    The page needs no other file and no network. Exit codes: 0 done, 2 bad request (nothing written), 3 the page could not be
    written, 5 the page is written, and something is wrong with the output.
    """
    from pipeline.reporting.report import make_report

    with levels(quiet=False) as advance:
        made = make_report(
            directory, source, quant_ckpt_path=quant_ckpt_path, output=output, verification=verification, advance=advance
        )
    print(escaped(f"wrote {made.page}"))
    if not made.ok:
        raise VerificationFailed(made.verification.problems)
