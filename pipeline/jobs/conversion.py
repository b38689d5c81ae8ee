"""One conversion in a process of its own: started, heard, stopped. Its memory is given back when it ends."""

from __future__ import annotations

import contextlib
import json
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

from pipeline.jobs.parent import word

TAIL_LINES = 40  # of what a process that failed said last
ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> list[str]:
    """The command that runs a module of headrace with this interpreter."""
    # -P: a folder named `pipeline` in the current directory must not be imported instead.
    return [sys.executable, "-P", "-m", *arguments]


def environment() -> dict[str, str]:
    """This process's environment, in which a process of this interpreter finds the same package."""
    # Where it is installed it is found anyhow, and what a process starts in its turn may be of another Python.
    installed = str(ROOT) in {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    paths = [*([] if installed else [str(ROOT)]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}), "PYTHONUNBUFFERED": "1"}


class Process:
    """A process that converts a job file, waiting until `go`.

    It must be made in a thread that lives as long as it is to run: Linux ends it with that thread. `heard` is called with each
    event that it reports, from another thread; what it said is in `done_bytes`, `total_bytes`, `stages`, `finished` and `error`.
    """

    def __init__(self, job_file: Path, heard: Callable[[Mapping[str, Any]], None]) -> None:
        self.heard = heard
        self.done_bytes = self.total_bytes = 0
        self.stages: Mapping[str, Mapping[str, float]] = {}
        self.finished: Mapping[str, Any] = {}
        self.error: Mapping[str, Any] = {}
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.begun = self.moved = time.monotonic()
        # A group of its own: Ctrl-C reaches the parent alone, which then stops its children in order.
        self._process = subprocess.Popen(
            command("pipeline.cli.child", "convert", str(job_file), "--log_format", "json"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"headrace-{self.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self.begun

    def go(self) -> None:
        """Let it begin."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is gone already, as its exit code will say
            self._process.stdin.write(word(os.getpid()))
            self._process.stdin.flush()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, once all that it said has been heard; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=5)  # a process that it started may hold its end open
            self._close()
        return code

    def stop(self) -> None:
        """Ask it to end in order: what it has done is kept."""
        self._send(signal.SIGTERM)

    def kill(self) -> int:
        """End it at once, and wait for that."""
        self._send(signal.SIGKILL)
        self._process.wait()
        code = self.poll()
        assert code is not None
        return code

    def report(self) -> str:
        """The process's own account of what went wrong: the error that it reported, or else the last lines that it printed."""
        return str(self.error.get("message") or "\n".join(self.tail))

    @property
    def passing(self) -> bool:
        """Whether all that it was refused for may mend itself."""
        problems = self.error.get("problems") or []
        return bool(problems) and all(problem.get("passing") for problem in problems)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stderr):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip("\n")
            try:
                event = json.loads(text)
                kind = event["event"]
            except (ValueError, TypeError, KeyError):
                self.tail.append(text)
                continue
            self._take(kind, event)
            self.heard(event)

    def _take(self, kind: str, event: Mapping[str, Any]) -> None:
        if kind == "started":
            self.done_bytes, self.total_bytes = event["done_bytes"], event["bytes"]
        elif kind == "progress":
            self.done_bytes, self.total_bytes, self.stages = event["bytes"], event["total_bytes"], event["stages"]
        elif kind == "finished":
            self.finished, self.stages = event, event["stages"]
        elif kind == "error":
            self.error = event
        self.moved = time.monotonic()
