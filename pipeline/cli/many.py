"""The part that the commands about many conversions share: how they end, what they print, and the package that they need."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

from pipeline.errors import BadInput, Problem


def stop_in_order(stop: threading.Event) -> None:
    """Have Ctrl-C and SIGTERM set `stop`, so that conversions are interrupted in order; a second signal ends all at once."""

    def handle(*_: object) -> None:
        if stop.is_set():
            os._exit(3)  # what converts ends with this process
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def missing_extra(error: ModuleNotFoundError) -> BadInput:
    """The error that says which package is not installed."""
    return BadInput([Problem("headrace[jobs]", f"no package {error.name}", "it installed", "Run pip install 'headrace[jobs]'")])


def show(facts: Any, as_json: bool, table: str) -> None:
    """Print facts as JSON, or as a table made by the function of pipeline.jobs.report named `table`."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from pipeline.jobs import report
    from pipeline.reporting.terminal import console

    console().print(getattr(report, table)(facts))
