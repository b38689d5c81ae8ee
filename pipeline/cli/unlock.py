"""The command `headrace unlock`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.help import HelpCommand
from pipeline.printed import escaped
from pipeline.tensor.bucket import output_at
from pipeline.tensor.remote_path import is_remote

app = typer.Typer()


@app.command("unlock", cls=HelpCommand, no_args_is_help=True, epilog="headrace unlock ranks")
def unlock_command(
    directories: Annotated[
        list[Path], typer.Argument(parser=output_at, help="Outputs, or cuts of scratch, as the error names them.")
    ],
) -> None:
    """Release directories at which a process of another machine was at work, once you know that it is gone.

    A process of this machine that ended needs no release; one that still runs is refused (exit code 2).
    """
    from pipeline.sinks import bucket_hold, hold

    for directory in directories:
        found = bucket_hold.release(directory) if is_remote(directory) else hold.release(directory)
        said = f"released, it was held by process {found.pid} on {found.host}" if found else "nobody is at work there"
        print(escaped(f"{directory}: {said}"))
