"""The command `headrace serve`: the daemon that converts by a schedule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.jobs import StorePath, opened, stop_in_order
from pipeline.cli.options import LogFormat
from pipeline.jobs.log import Log

app = typer.Typer()


@app.command("serve", no_args_is_help=True)
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
    with opened(store) as jobs_store:
        from pipeline.jobs.files import validate
        from pipeline.jobs.listening import Http
        from pipeline.jobs.schedule import read_schedule
        from pipeline.jobs.serve import Daemon
        from pipeline.jobs.services import services

        settings = read_schedule(schedule)
        if listen is not None:
            http = validate(Http, {"listen": listen}, "--listen")
            settings = settings.model_copy(update={"http": settings.http.model_copy(update={"listen": http.listen})})
        daemon = Daemon(settings, jobs_store, Log(sys.stderr, log_format))
        daemon.services += services(daemon)
        stop_in_order(daemon.stop, daemon.runner)
        code = daemon.run()
    raise typer.Exit(code)
