"""The command `headrace report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.levels import levels
from pipeline.errors import BadInput, Problem, VerificationFailed

if TYPE_CHECKING:
    from pipeline.reporting.html.summary import VerificationSummary

app = typer.Typer()


@app.command("report", no_args_is_help=True)
def report_command(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="A finished output directory.", show_default=False)],
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
    from pipeline.reporting.html import check_report_path, default_report_path, describe_directory, render_report, write_report
    from pipeline.reporting.html.summary import load_summary
    from pipeline.reporting.verification import open_output

    if verification and (source or quant_ckpt_path):
        remedy = "The verification says what it was of"
        raise BadInput([Problem("--source", "a source beside --verification", "one or the other", remedy)])
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 (links stay as they are)
    output = default_report_path(directory) if output is None else output
    check_report_path(output, directory)
    summary = load_summary(verification) if verification else _verified(directory, source, quant_ckpt_path)
    try:
        checkpoint = open_output(directory)
    except BadInput:
        if summary.ok:
            raise
        checkpoint = describe_directory(directory)
    write_report(output, render_report(checkpoint, summary))
    print(f"wrote {output}")
    if not summary.ok:
        raise VerificationFailed(summary.problems)


def _verified(directory: Path, source: str | None, quant_ckpt_path: Path | None) -> VerificationSummary:
    """What a verification finds now: in the files alone, and in each value beside the source's where there is one."""
    from pipeline.reporting.html import describe_directory
    from pipeline.reporting.html.provenance import recorded_source
    from pipeline.reporting.html.summary import parse_summary
    from pipeline.reporting.verification import verify

    source = source or recorded_source(describe_directory(directory))
    with levels(quiet=False) as advance:
        result = verify(directory, source, quant_ckpt_path=quant_ckpt_path, advance=advance)
    return parse_summary(result.summary())
