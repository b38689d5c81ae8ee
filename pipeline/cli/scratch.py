"""The commands `headrace scratch ls` and `headrace scratch rm`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.help import HelpCommand, HelpGroup
from pipeline.cli.shared import Json
from pipeline.errors import BadInput, Problem
from pipeline.printed import escaped, many
from pipeline.tensor.remote_path import as_path, is_remote
from pipeline.watching.units import human_bytes

if TYPE_CHECKING:
    from pipeline.sinks.scratch_listing import ScratchCut

app = typer.Typer(cls=HelpGroup, no_args_is_help=True, help="Look at or remove the Zarr scratch that jobs keep.")

ROOT = "The scratch directory or URL, as given to --scratch, or a URL of outputs, for unfinished uploads."
RM = "headrace scratch rm DIR Llama-3.1-8B-unpack-3f9ac0d1b2c47e05.zarr\nheadrace scratch rm DIR --all --yes"


@app.command("ls", cls=HelpCommand, epilog="headrace scratch ls\nheadrace scratch ls /fast/scratch")
def scratch_ls(
    root: Annotated[
        Path | None,
        typer.Argument(
            parser=as_path, metavar="DIR", help=f"{ROOT} Without one: all of the default name that are found from here."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """List the cuts in a scratch directory; below a URL also the uploads that nobody has completed.

    Without a directory: in each .headrace-scratch in the current directory, its folders and the one above, and beside the outputs
    of `headrace serve` on this machine.
    """
    from pipeline.sinks.bucket_listing import list_bucket
    from pipeline.sinks.scratch_listing import find_scratch, list_scratch

    roots = [root] if root else find_scratch(Path.cwd(), _served())
    cuts = {each: list_bucket(each) if is_remote(each) else list_scratch(each) for each in roots}
    if json_:
        rows = [
            {
                "path": str(cut.directory),
                "stage": cut.stage,
                "source": cut.source,
                "complete": cut.complete,
                "bytes": cut.size_bytes,
            }
            for each in cuts.values()
            for cut in each
        ]
        print(json.dumps(rows, indent=2))
        return
    from pipeline.reporting.terminal import console, scratch_table

    if not roots:
        print("no .headrace-scratch here, in the folders here, or above; name the directory that --scratch was given")
    for place, found in cuts.items():
        console().print(escaped(f"{place}: {many(len(found), 'cut')}, {human_bytes(sum(cut.size_bytes for cut in found))}"))
        if found:
            console().print(scratch_table(found))


@app.command("rm", cls=HelpCommand, epilog=RM)
def scratch_rm(
    root: Annotated[Path, typer.Argument(parser=as_path, metavar="DIR", help=ROOT)],
    names: Annotated[list[str] | None, typer.Argument(metavar="CUT", help="Cuts to remove, as `scratch ls` names them.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Remove all cuts there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all: do it.")] = False,
) -> None:
    """Remove cuts, and abort uploads; one that a job is at work on is refused, and all with it.

    Exit codes: 0 done, 2 nothing was removed.
    """
    from pipeline.sinks.bucket_listing import list_bucket, remove_in_bucket
    from pipeline.sinks.scratch_listing import list_scratch, remove_scratch

    found, remove = (list_bucket(root), remove_in_bucket) if is_remote(root) else (list_scratch(root), remove_scratch)
    if not names:
        _sure(root, found, all_, yes)
    elif all_:
        raise BadInput([Problem("--all", f"{many(len(names), 'name')} beside it", "names, or --all")])
    for cut in remove(root, names or ([] if is_remote(root) else [cut.directory.name for cut in found])):
        done = "aborted the upload of" if cut.upload else "removed"
        print(escaped(f"{done} {cut.directory}, {human_bytes(cut.size_bytes)}"))


def _sure(root: Path, cuts: list[ScratchCut], all_: bool, yes: bool) -> None:
    """Raise BadInput where it was not said that all cuts are meant, and that it is meant."""
    there = f"{many(len(cuts), 'cut')} there, {human_bytes(sum(cut.size_bytes for cut in cuts))}"
    if not all_:
        expected = "names of cuts, as `headrace scratch ls` lists them, or --all --yes"
        raise BadInput([Problem(str(root), f"no name ({there})", expected)])
    if not yes:
        raise BadInput([Problem(f"{root} --all", f"no --yes ({there})", "--yes, for they cannot be had back")])


def _served() -> list[Path]:
    """The outputs that the history of `headrace serve` on this machine names; none where there is no history."""
    try:
        from pipeline.jobs.history import History, default_path
    except ModuleNotFoundError:
        return []
    try:
        if not default_path().exists():
            return []
        history = History(default_path())
    except BadInput:
        return []
    try:
        return [Path(output) for run in history.runs(None, 1000) for output in run["outputs"]]
    finally:
        history.close()
