"""A daemon's directory in a test: a model, a schedule and a history, with the daemon in a thread or a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import BadInput
from pipeline.jobs.history import History
from pipeline.jobs.log import Log
from pipeline.jobs.schedule import read_schedule
from pipeline.jobs.serve import Daemon
from tests.support import checkpoints
from tests.support.commands import COMMAND, Ran, headrace

# Holds the conversions of a daemon, when they open their job files, until a file is there.
HOLDING = """
import pathlib, sys, time
def hold(event, arguments):
    if event == "open" and "/headrace-" in str(arguments[0]) and str(arguments[0]).endswith("/job.toml"):
        while not pathlib.Path({go!r}).exists(): time.sleep(0.05)
if sys.orig_argv[3:4] == ["pipeline.cli.child"] and "convert" in sys.orig_argv:
    sys.addaudithook(hold)
"""


class Place:
    """A directory with a model, a schedule and a daemon's history."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.schedule, self.path = folder, folder / "schedule.toml", folder / "history.db"
        checkpoints.write(folder / "model", checkpoints.LLAMA)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def often(self, every: float = 3600, more: str = "") -> None:
        """A schedule of one interval, and the job that it does."""
        self.write("job.toml", 'model_dir = "model"\noutput_dir = "out"\ntp_size = 2\n')
        text = f'[[interval]]\nname = "often"\nevery_seconds = {every}\nfiles = ["job.toml"]\n[retry]\nfirst_seconds = 0.2\n{more}'
        self.write("schedule.toml", text)

    def runs(self) -> list[dict[str, Any]]:
        """All that is recorded, the oldest first."""
        with contextlib.closing(History(self.path)) as opened:
            return opened.runs()[::-1]

    def states(self) -> list[str]:
        try:
            return [run["state"] for run in self.runs()]
        except (sqlite3.Error, BadInput):  # it is not there yet, or not whole
            return []

    def jobs(self, *words: object) -> Ran:
        return headrace("jobs", *words, "--store", self.path)

    @contextlib.contextmanager
    def serving(self) -> Iterator[list[dict[str, Any]]]:
        """A daemon in a thread of this process; yields what it says."""
        stream, said = io.StringIO(), list[dict[str, Any]]()
        opened = History(self.path, write=True)
        daemon = Daemon(read_schedule(self.schedule), opened, Log(stream, "json"))
        thread = threading.Thread(target=daemon.run)
        thread.start()
        try:
            yield said
        finally:
            daemon.stop.set()
            thread.join()
            opened.close()
            said += map(json.loads, stream.getvalue().splitlines())

    @contextlib.contextmanager
    def process(self, *more: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A daemon in a process of its own."""
        command = [*COMMAND, "serve", str(self.schedule), "--store", str(self.path), "--log_format", "json", *more]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}) as started:
            try:
                yield started
            finally:
                started.kill()

    def holding(self) -> dict[str, str]:
        """The environment of a daemon whose conversions wait for the file `go`."""
        (self.folder / "site").mkdir()
        self.write("site/sitecustomize.py", HOLDING.format(go=str(self.folder / "go")))
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(self.folder / "site"), os.environ.get("PYTHONPATH", ""))))}
