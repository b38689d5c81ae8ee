"""The command `headrace serve`: the daemon that converts by a schedule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.help import HelpCommand
from pipeline.cli.jobs import StorePath, history
from pipeline.cli.many import stop_in_order
from pipeline.cli.shared import LogFormat

app = typer.Typer()


@app.command("serve", cls=HelpCommand, no_args_is_help=True, epilog="headrace serve schedule.toml --listen 127.0.0.1:8788")
def serve_command(
    schedule: Annotated[Path, typer.Argument(help="A TOML file of triggers.", show_default=False)],
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT of page and metrics [default: 127.0.0.1:8788].", show_default=False)
    ] = None,
    store: StorePath = None,
    log_format: LogFormat = "text",
) -> None:
    """Convert by a schedule: at times of the calendar, every so often, and whatever arrives in a directory or an object store.

    Runs until SIGTERM or Ctrl-C, which leave what is under way to be taken up at the next start. One daemon a store.
    """
    with history(store, write=True) as opened:
        from pipeline.jobs.files import validate
        from pipeline.jobs.log import Log
        from pipeline.jobs.schedule import Http, read_schedule
        from pipeline.jobs.serve import Daemon

        settings = read_schedule(schedule)
        if listen is not None:
            http = validate(Http, {"listen": listen, "hosts": settings.http.hosts}, "--listen")
            settings = settings.model_copy(update={"http": http})
        daemon = Daemon(settings, opened, Log(sys.stderr, log_format))
        stop_in_order(daemon.stop)
        code = daemon.run()
    raise typer.Exit(code)
