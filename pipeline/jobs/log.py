"""Events of runs as lines on a stream: text for people, or JSON, one object a line."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from pipeline.jobs.runs import Run
from pipeline.printed import escaped
from pipeline.watching.progress import LogFormat
from pipeline.watching.units import human_bytes

PROGRESS_SECONDS = 10.0  # between two lines of progress of a conversion, in text
LONGEST = 20_000  # characters of a line


class Log:
    """Writes a line for each event; of progress, in text, one now and then."""

    def __init__(self, stream: IO[str], log_format: LogFormat, quiet: bool = False) -> None:
        """`quiet`: of runs it says nothing."""
        self.stream, self.as_json, self.quiet = stream, log_format == "json", quiet
        self._shown: dict[int, float] = {}
        self._lock = threading.Lock()

    def __call__(self, event: str, run: Run, said: Mapping[str, Any]) -> None:
        if self.quiet or (event == "queued" and run.unit.state != "to do"):
            return
        values: Mapping[str, Any] = said
        if event == "ended":
            values = {"outcome": run.state, "exit_code": run.exit_code, "error": run.error, "attempts": len(run.attempts)}
        if self.as_json:
            self._write(
                json.dumps({**values, "event": event, "time": round(time.time(), 3), "run": run.number, "name": run.unit.name})
            )
        elif text := self._text(event, run, said):
            self._write(f"{time.strftime('%H:%M:%S')} {run.unit.name}: {text}")

    def say(self, event: str, text: str) -> None:
        """Write a line about the batch or the daemon itself."""
        line = {"event": event, "time": round(time.time(), 3), "message": text}
        self._write(json.dumps(line) if self.as_json else f"{time.strftime('%H:%M:%S')} {text}")

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Have what Python's loggers say, those of other packages too, as lines of this log while the context lasts."""
        handler = _Handler(self)
        loggers = [logging.getLogger(name) for name in ("", "distributed", "headrace", "apscheduler")]
        kept = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.handlers[:] = [handler]
            logger.propagate = False
        try:
            yield
        finally:
            for logger, handlers, propagate in kept:
                logger.handlers[:], logger.propagate = handlers, propagate

    def _write(self, line: str) -> None:
        with self._lock:
            print(escaped(line[:LONGEST], keep="\n"), file=self.stream, flush=True)

    def _text(self, event: str, run: Run, said: Mapping[str, Any]) -> str:
        if event == "queued":
            return f"queued ({run.cause})"
        if event == "started":
            again = f", attempt {said['attempt']}" if said["attempt"] > 1 else ""
            return f"started as process {said['pid']} on {said['host']}{again}"
        if event == "progress":
            if time.monotonic() - self._shown.get(run.number, 0.0) < PROGRESS_SECONDS:
                return ""
            self._shown[run.number] = time.monotonic()
            rate = f"{said.get('bytes_per_second', 0) / 1e9:.2f} GB/s, {said.get('eta_seconds', 0):.0f} s left"
            return f"{human_bytes(said['bytes'])} of {human_bytes(said['total_bytes'])}, {rate}"
        if event == "stalled":
            return f"has written nothing for {said['seconds']:.0f} s"
        if event == "retried":
            return f"{said['outcome']}; again in {said['seconds']:.0f} s: {said['error']}"
        self._shown.pop(run.number, None)
        if run.state == "done":
            return f"done in {run.total('seconds'):.1f} s, {human_bytes(int(run.total('bytes_written')))} written"
        if run.state == "unsettled":
            return "left for another time: its source was written to a moment ago"
        return "up to date: nothing to do" if run.state == "up_to_date" else f"{run.state} (exit code {run.exit_code}): {run.error}"


class _Handler(logging.Handler):
    """Hands records of warnings and errors to a log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(record.levelname.lower(), self.format(record))
