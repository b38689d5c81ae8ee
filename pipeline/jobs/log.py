"""Events as lines on a stream: text for people, or JSON, one object a line."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from typing import IO

from pipeline.jobs.events import Event, JobFinished, JobQueued, JobStarted, Progress, Stalled
from pipeline.printed import escaped
from pipeline.watching.progress import LogFormat
from pipeline.watching.units import human_bytes

PROGRESS_SECONDS = 10.0  # between two lines of progress of a conversion, in text


class Log:
    """Writes a line for each event; of progress, in text, one now and then."""

    def __init__(self, stream: IO[str], log_format: LogFormat) -> None:
        self.stream, self.as_json = stream, log_format == "json"
        self._shown: dict[int, float] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if self.as_json:
            self.write(json.dumps({"event": _name(event), **asdict(event)}))
        elif text := self._text(event):
            self.write(f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.name}: {text}")

    def say(self, event: str, text: str) -> None:
        """Write a line about the daemon itself, which is no event of a job."""
        moment = time.time()
        line = {"event": event, "time": round(moment, 3), "message": text}
        self.write(json.dumps(line) if self.as_json else f"{time.strftime('%H:%M:%S', time.localtime(moment))} {text}")

    def write(self, line: str) -> None:
        """Write a line, whole."""
        with self._lock:
            print(escaped(line, keep="\n"), file=self.stream, flush=True)

    def _text(self, event: Event) -> str:
        if isinstance(event, JobQueued):
            return f"queued ({event.cause})"
        if isinstance(event, JobStarted):
            again = f", attempt {event.attempt}" if event.attempt > 1 else ""
            return f"started as process {event.pid}{again}"
        if isinstance(event, Progress):
            if event.time - self._shown.get(event.run, 0.0) < PROGRESS_SECONDS:
                return ""
            self._shown[event.run] = event.time
            rate = f"{event.bytes_per_second / 1e9:.2f} GB/s, {event.eta_seconds:.0f} s left"
            return f"{human_bytes(event.bytes)} of {human_bytes(event.total_bytes)}, {rate}"
        if isinstance(event, Stalled):
            return f"has written nothing for {event.seconds:.0f} s"
        if isinstance(event, JobFinished):
            self._shown.pop(event.run, None)
            return _finished(event)
        return ""


def _finished(event: JobFinished) -> str:
    if event.outcome == "done":
        return f"done in {event.seconds:.1f} s, {human_bytes(event.bytes)} written"
    if event.outcome == "up_to_date":
        return "up to date: nothing to do"
    again = "" if event.retry_seconds is None else f"; again in {event.retry_seconds:.0f} s"
    return f"{event.outcome} (exit code {event.exit_code}){again}: {event.error}".rstrip(": ")


def _name(event: Event) -> str:
    names = {JobQueued: "queued", JobStarted: "started", Progress: "progress", JobFinished: "finished", Stalled: "stalled"}
    return names.get(type(event), type(event).__name__)
