"""A command of headrace in a process of its own, heard and stopped. Its memory is given back when it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TAIL_LINES = 100  # of what it said last
LONGEST_LINE = 1 << 20  # bytes
LONGEST_KEPT = 4096  # characters of a line of the tail
ROOT = Path(__file__).resolve().parents[2]

Heard = Callable[[Mapping[str, Any]], None]


def environment() -> dict[str, str]:
    """This process's environment, in which a process of this interpreter finds the same package."""
    # Where it is installed it is found anyhow, and what a process starts in its turn may be of another Python.
    installed = str(ROOT) in {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    paths = [*([] if installed else [str(ROOT)]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}), "PYTHONUNBUFFERED": "1"}


class Child:
    """`headrace WORDS`, with `--log_format json` where it takes that.

    It must be made in a thread that lives as long as it is to run: Linux ends it with that thread. `heard` is called, from another
    thread, with each event that it reports on standard error; `events` are the last of each kind, `tail` its last other lines.
    """

    def __init__(self, words: list[str], heard: Heard = lambda _: None, stdout: int = subprocess.DEVNULL) -> None:
        self._heard = heard
        self.events: dict[str, Mapping[str, Any]] = {}
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.begun = time.monotonic()
        # -P: a folder named `pipeline` in the current directory must not be imported instead. A group of its own: Ctrl-C reaches
        # the parent alone, which then stops its children in order.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.cli.child", str(os.getpid()), *words],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"headrace-{self.process.pid}", daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, once all that it said has been heard; None while it runs."""
        code = self.process.poll()
        if code is not None:
            self._reader.join(timeout=5)  # a process that it started may hold its end open
            for stream in (self.process.stdin, self.process.stderr):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGTERM has it end in order, and what it has done is kept."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def report(self, code: int) -> str:
        """The reason of its end, by its own account: the error that it reported, or else the last lines that it printed."""
        said = str(self.events.get("error", {}).get("message") or "\n".join(self.tail))
        return f"ended by {signal.Signals(-code).name}\n{said}".rstrip() if code < 0 else said

    def _read(self) -> None:
        assert self.process.stderr
        while line := self.process.stderr.readline(LONGEST_LINE):
            text = line.decode(errors="replace").rstrip("\n")
            try:
                event = json.loads(text)
                self.events[str(event["event"])] = event
            except (ValueError, TypeError, KeyError, RecursionError):
                self.tail.append(text[:LONGEST_KEPT])
                continue
            try:
                self._heard(event)
            except Exception:  # nobody would read what follows, and the child would wait for that
                logging.getLogger(__name__).exception("an event of process %d", self.process.pid)
