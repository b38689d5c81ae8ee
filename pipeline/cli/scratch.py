"""The commands `headrace scratch ls` and `headrace scratch rm`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Json
from pipeline.printed import escaped
from pipeline.tensor.remote_path import as_path, is_remote

app = typer.Typer(no_args_is_help=True, help="Look at or remove the Zarr scratch that jobs keep.")
ScratchRoot = Annotated[
    Path,
    typer.Argument(parser=as_path, metavar="ROOT", help="The scratch directory or URL, or a URL of outputs: unfinished uploads."),
]


@app.command("ls")
def scratch_ls(root: ScratchRoot, json_: Json = False) -> None:
    """List the cuts in a scratch directory; below a URL also the uploads that nobody has completed."""
    from pipeline.sinks.bucket_listing import list_bucket
    from pipeline.sinks.scratch_listing import list_scratch

    cuts = list_bucket(root) if is_remote(root) else list_scratch(root)
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
    """Remove cuts, and abort uploads; one that a job is at work on is refused."""
    from pipeline.sinks.bucket_listing import remove_in_bucket
    from pipeline.sinks.scratch_listing import remove_scratch

    for cut in (remove_in_bucket if is_remote(root) else remove_scratch)(root, names or []):
        print(escaped(f"{'aborted the upload of' if cut.upload else 'removed'} {cut.directory}"))
