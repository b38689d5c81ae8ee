"""Show the progress of a run: a live bar on a terminal, plain or JSON lines elsewhere, or nothing."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Literal

from pipeline.printed import escaped
from pipeline.watching.bar import ProgressBar
from pipeline.watching.listener import Listener, Silent
from pipeline.watching.notes import layer, notes, page_address
from pipeline.watching.steps import files_words, step, whole_files
from pipeline.watching.units import human_bytes, human_rate

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan
    from pipeline.watching.state import RunWatch, Snapshot
    from stages.write import Written

LogFormat = Literal["text", "json"]
LINE_SECONDS = 2.0  # between two lines of progress where there is no terminal


def listener(quiet: bool, log_format: LogFormat, watch: RunWatch, stream: IO[str] | None = None) -> Listener:
    """Return the listener for `stream` (standard error by default): a bar on a terminal, otherwise lines of text or JSON."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    if log_format == "json":
        return ProgressLines(stream, watch, as_json=True)
    return ProgressBar(stream, watch) if stream.isatty() else ProgressLines(stream, watch)


class ProgressLines:
    """A listener that prints a line at the start and one every LINE_SECONDS, of text or as JSON objects."""

    def __init__(self, stream: IO[str], watch: RunWatch, as_json: bool = False) -> None:
        self.stream, self.watch, self.as_json = stream, watch, as_json
        self.done = self.total = self.resumed = 0
        self.begun = self.last = time.monotonic()

    def _say(self, event: str, text: str, **values: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) if self.as_json else escaped(text)
        print(line, file=self.stream, flush=True)

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        self.total, self.done, self.resumed, self.begun = total_bytes, done_bytes, done_bytes, time.monotonic()
        text = f"converting {plan.source.place} in {plan.tasks} tasks"
        for part in notes(plan, dashboard, done_tasks):
            text += f"; {part}"
        values = {"tasks": plan.tasks, "done_tasks": done_tasks, "bytes": total_bytes, "done_bytes": done_bytes}
        places = {"dashboard": dashboard, "page": page_address(plan.job, dashboard)}
        self._say("started", text, source=plan.source.place, **values, **places, left_out=len(plan.left_out))

    def advanced(self, written: Written) -> None:
        self.done += written.bytes_written
        now = time.monotonic()
        if now - self.last < LINE_SECONDS and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.resumed) / max(now - self.begun, 1e-9)
        eta = (self.total - self.done) / max(rate, 1)
        snapshot = self.watch.snapshot()
        text = f"{step(snapshot)}: {human_bytes(self.done)} of {human_bytes(self.total)}, {human_rate(rate)}"
        text += f", {eta:.0f} s left" if self.done < self.total else ""
        text += f", {files}" if (files := files_words(snapshot)) else ""
        values = {"bytes": self.done, "total_bytes": self.total, "bytes_per_second": round(rate), "eta_seconds": round(eta, 1)}
        self._say("progress", text, **values, layer=layer(written.name), **_snapshot_fields(snapshot))

    def calibrated(self, done: int, layers: int, seconds_left: float) -> None:
        """Say that a layer is calibrated, and how long the rest may take."""
        values = {"bytes": self.done, "total_bytes": self.total, "bytes_per_second": 0, "eta_seconds": round(seconds_left, 1)}
        text = f"layer {done} of {layers} calibrated, {seconds_left:.0f} s left"
        self._say("progress", text, **values, layer=f"calibrated {done}", **_snapshot_fields(self.watch.snapshot()))

    def finished(self) -> None:
        pass


def _snapshot_fields(now: Snapshot) -> dict[str, Any]:
    """Return the fields of a JSON line that come from a snapshot; `ranks` are [target, rank, bytes written, total bytes]."""
    return {
        "step": step(now),
        "rank_files": len(now.ranks),
        "whole_rank_files": whole_files(now),
        "bytes_read": now.bytes_read,
        "scratch_bytes_read": now.scratch_bytes_read,
        "bytes_written": now.bytes_written,
        "scratch_bytes_written": now.scratch_bytes_written,
        "tasks": now.tasks,
        "done_tasks": now.done_tasks,
        **({"calibrated_layers": now.calibrated_layers, "layers": now.layers} if now.layers else {}),
        "memory_bytes": now.memory_bytes,
        "memory_limit_bytes": now.memory_limit_bytes,
        "stages": {stage: {unit: round(value, 6) for unit, value in totals.items()} for stage, totals in now.stages.items()},
        "ranks": [[share.target, share.rank, share.done_bytes, share.total_bytes] for share in now.ranks],
    }
