"""The commands `headrace jobs`: what a daemon's history says, and what the daemon is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from pipeline.cli.help import HelpCommand, HelpGroup
from pipeline.cli.many import missing_extra, show
from pipeline.cli.shared import Json
from pipeline.errors import BadInput, Problem, WriteFailed
from pipeline.printed import escaped

if TYPE_CHECKING:
    from pipeline.jobs.history import History

app = typer.Typer(cls=HelpGroup, help="What `headrace serve` did and does: list jobs, look at one, cancel it or do it again.")

StorePath = Annotated[
    Path | None,
    typer.Option("--store", help="The daemon's history; default: $XDG_STATE_HOME/headrace/history.db.", show_default=False),
]
JobNumber = Annotated[int, typer.Argument(help="The number of a job, as `headrace jobs` lists it.")]
LIMIT = 100  # jobs of a list, where nothing else is said


@contextmanager
def history(path: Path | None, write: bool = False) -> Iterator[History]:
    """Open the history at `path` (None: the default place), and close it at the end.

    Raises BadInput where a package is missing or it cannot be opened, and WriteFailed (exit code 3) where it fails later.
    """
    import sqlite3

    try:
        from pipeline.jobs.history import History, default_path
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    opened = History(path or default_path(), write)
    try:
        yield opened
    except sqlite3.Error as error:
        raise WriteFailed(f"{opened.path}: {error}") from error
    finally:
        opened.close()


@app.callback(invoke_without_command=True)
def jobs_command(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only those in a state, such as failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = LIMIT,
    store: StorePath = None,
    json_: Json = False,
) -> None:
    """List jobs, the newest first."""
    context.obj = store
    if context.invoked_subcommand is None:
        list_command(context, state, limit, store, json_)
        return
    given = {f"--state {state}": state, f"--limit {limit}": limit != LIMIT, "--json": json_}
    before = f"it before `{context.invoked_subcommand}`"
    if problems := [Problem(option, before, "it behind that command") for option, there in given.items() if there]:
        raise BadInput(problems)


@app.command("list", cls=HelpCommand, epilog="headrace jobs list --state failed")
def list_command(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only those in a state, such as failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = LIMIT,
    store: StorePath = None,
    json_: Json = False,
) -> None:
    """List jobs, the newest first."""
    with history(store or context.obj) as opened:
        from pipeline.jobs.runs import State

        if state and state not in get_args(State):
            raise BadInput([Problem("--state", state, f"one of {', '.join(get_args(State))}")])
        show(opened.runs(state, limit), json_, "jobs_table")


@app.command("show", cls=HelpCommand, epilog="headrace jobs show 12")
def show_command(context: typer.Context, number: JobNumber, store: StorePath = None, json_: Json = False) -> None:
    """Show a job: its options, its figures, and all of what was wrong."""
    with history(store or context.obj) as opened:
        show(opened.run(number), json_, "job_table")


@app.command("logs", cls=HelpCommand, epilog="headrace jobs logs 12")
def logs_command(context: typer.Context, number: JobNumber, store: StorePath = None) -> None:
    """Print the last lines that a job's processes have printed, and its error."""
    with history(store or context.obj) as opened:
        row = opened.run(number)
        print(escaped("\n".join(filter(None, (row["log"], row["error"]))), keep="\n"))


@app.command("cancel", cls=HelpCommand, epilog="headrace jobs cancel 12")
def cancel_command(context: typer.Context, number: JobNumber, store: StorePath = None) -> None:
    """Have the daemon cancel a job that waits or runs. What it has written stays: `retry` goes on from there."""
    _ask(context, number, store, "cancel")


@app.command("retry", cls=HelpCommand, epilog="headrace jobs retry 12")
def retry_command(context: typer.Context, number: JobNumber, store: StorePath = None) -> None:
    """Have the daemon do a job again; where none is at work, the next one does."""
    _ask(context, number, store, "retry")


def _ask(context: typer.Context, number: int, store: Path | None, action: str) -> None:
    with history(store or context.obj) as opened:
        from pipeline.jobs.runs import ACTIVE

        row = opened.run(number)
        wrong = {
            "cancel": (row["state"] not in ACTIVE, f"it ended: {row['state']}", "a job that waits or runs"),
            "retry": (row["state"] in ACTIVE, f"it is {row['state']}", "a job that has ended"),
        }[action]
        if wrong[0]:
            raise BadInput([Problem(f"job {number}", *wrong[1:])])
        if not row["outputs"]:
            raise BadInput([Problem(f"job {number}", "a request that never became one", "a job", "Mend it, and ask again")])
        try:
            opened.ask(action, number)
        except OSError as error:
            raise BadInput([Problem(str(opened.asked), error.strerror or "an error", "the daemon's directory")]) from None
        print(f"job {number}: asked to {action}")
