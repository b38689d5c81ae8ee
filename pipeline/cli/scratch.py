"""The commands `headrace scratch ls` and `headrace scratch rm`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Json
from pipeline.printed import escaped

app = typer.Typer(no_args_is_help=True, help="Look at or remove the Zarr scratch that jobs keep.")
ScratchRoot = Annotated[Path, typer.Argument(help="The scratch directory, as given to --scratch.")]


@app.command("ls")
def scratch_ls(root: ScratchRoot, json_: Json = False) -> None:
    """List the cuts in a scratch directory."""
    from pipeline.sinks.scratch_listing import list_scratch

    cuts = list_scratch(root)
    if json_:
        rows = [
            {
                "path": str(cut.directory),
                "stage": cut.stage,
                "source": cut.source,
                "complete": cut.complete,
                "bytes": cut.size_bytes,
            }
            for cut in cuts
        ]
        print(json.dumps(rows, indent=2))
        return
    from pipeline.reporting.terminal import console, scratch_table

    console().print(scratch_table(cuts))


@app.command("rm")
def scratch_rm(
    root: ScratchRoot, names: Annotated[list[str] | None, typer.Argument(help="Cuts to remove; all where none is named.")] = None
) -> None:
    """Remove cuts; one that a job is at work on is refused."""
    from pipeline.sinks.scratch_listing import remove_scratch

    for cut in remove_scratch(root, names or []):
        print(escaped(f"removed {cut.directory}"))
