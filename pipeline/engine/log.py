"""Report on engines under construction: the builders' own lines as they write them, as text or as JSON lines, or nothing."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.printed import escaped
from pipeline.watching.progress import LogFormat
from pipeline.watching.units import human_bytes
from stages.build import ATTEMPT

POLL_SECONDS = 0.1  # between two looks at a log

_ATTEMPT = re.compile(rf"{re.escape(ATTEMPT)}(\d+) of (\d+)")


class BuildLog:
    """Writes what happens to engines, to standard error unless another stream is given."""

    def __init__(self, quiet: bool = False, log_format: LogFormat = "text", stream: IO[str] | None = None) -> None:
        self.quiet, self.as_json, self._stream = quiet, log_format == "json", stream
        self._lock = threading.Lock()

    @property
    def stream(self) -> IO[str]:
        """Where lines go; a progress bar of a conversion that goes on meanwhile takes standard error's place."""
        return self._stream or sys.stderr

    def say(self, event: str, text: str, **values: Any) -> None:
        """Write one line: `text`, or the event and its `values` as JSON."""
        if self.quiet:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) if self.as_json else escaped(text, keep="\t")
        with self._lock:
            print(line, file=self.stream, flush=True)

    def building(self, engine: Path, command: Sequence[str], dashboard: str) -> None:
        """Report that a build begins. `dashboard`: the address of Dask's, or ""."""
        text = f"building {engine}{f'; dashboard {dashboard}' if dashboard else ''}"
        self.say("building", text, engine=str(engine), command=list(command), dashboard=dashboard)

    def waiting(self, resource: str, scheduler: str) -> None:
        """Report that no worker has the resource yet. `scheduler`: its address, or the class of its cluster."""
        start = f"dask worker {scheduler} --resources {resource}=1" if "://" in scheduler else f"one of the {scheduler}"
        text = f"waiting for a Dask worker with the resource {resource}: {start}"
        self.say("waiting", text, resource=resource, scheduler=scheduler)

    def again(self, engine: Path, attempt: int, attempts: int) -> None:
        """Report that an attempt failed, and that another one follows."""
        text = f"the builder failed; attempt {attempt} of {attempts} to build {engine}"
        self.say("retry", text, engine=str(engine), attempt=attempt, attempts=attempts)

    def built(self, engine: Path, seconds: float, nbytes: int) -> None:
        """Report a finished engine."""
        text = f"built {engine} in {seconds:.1f} s, {human_bytes(nbytes)}"
        self.say("built", text, engine=str(engine), seconds=round(seconds, 3), bytes=nbytes)

    def following(self, logs: Mapping[Path, Path]) -> Tail:
        """Report each line that is added to the logs of engines, from now until the `with` block ends."""

        def said(path: Path, line: str) -> None:
            another = _ATTEMPT.fullmatch(line)
            if another:
                self.again(logs[path], int(another[1]), int(another[2]))
            else:
                self.say("builder", line, log=str(path), line=line)

        return Tail(tuple(logs), said)


class Tail:
    """Follows growing files in a thread, even before they are there; calls `say(path, line)` for each whole line.

    The files are opened anew each time, so that writes of other machines are seen through a network file system.
    """

    def __init__(self, paths: Sequence[Path], say: Any) -> None:
        self.say = say
        self._read = dict.fromkeys(paths, 0)
        self._begun = dict.fromkeys(paths, b"")
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="headrace-build-log", daemon=True)

    def __enter__(self) -> Tail:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for path, rest in self._begun.items():
            if rest:
                self._say(path, rest)

    def flush(self) -> None:
        """Report the lines that have been written until now."""
        with self._lock:
            for path in self._read:
                self._look(path)

    def _work(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.flush()
        self.flush()

    def _look(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                file.seek(self._read[path])
                text = file.read()
        except OSError:
            return
        self._read[path] += len(text)
        *lines, self._begun[path] = re.split(rb"[\r\n]+", self._begun[path] + text)
        for line in lines:
            self._say(path, line)

    def _say(self, path: Path, line: bytes) -> None:
        if line.strip():
            self.say(path, line.decode(errors="replace").rstrip())
