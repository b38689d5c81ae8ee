"""Show the progress of a run: a live bar on a terminal, plain or JSON lines elsewhere, or nothing."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Literal

from pipeline.planning.listen import PAGE, parse_listen
from pipeline.printed import escaped, printed
from pipeline.watching.listener import Listener, Silent
from pipeline.watching.units import human_bytes, human_rate

if TYPE_CHECKING:
    from pipeline.planning.job import Job
    from pipeline.planning.plans import Plan
    from pipeline.watching.state import RunWatch
    from stages.write import Written

LogFormat = Literal["text", "json"]
LINE_SECONDS = 2.0  # between two lines of progress where there is no terminal

_LAYER = re.compile(r"(?:transformer\.)?(layers\.\d+|[\w.]+?)(?:\.|$)")


def listener(quiet: bool, log_format: LogFormat, watch: RunWatch, stream: IO[str] | None = None) -> Listener:
    """Return the listener for `stream` (standard error by default): a bar on a terminal, otherwise lines of text or JSON."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    if log_format == "json":
        return ProgressLines(stream, watch)
    return ProgressBar(stream) if stream.isatty() else ProgressLines(stream)


def layer(name: str) -> str:
    """Return the part of a tensor's name that shows how far a run is: `layers.3`, `vocab_embedding`, `lm_head`."""
    match = _LAYER.match(name)
    return match[1] if match else name


def notes(plan: Plan, dashboard: str, done_tasks: int) -> list[str]:
    """List what to print at the start of a run: its pages, resumed work, reused scratch, the plan's notes, tensors left out."""
    page = page_address(plan.job, dashboard)
    result = [f"page {page}"] if page else []
    result += [f"dashboard {dashboard}"] if dashboard not in ("", page) else []
    if done_tasks:
        result.append(f"resuming: {done_tasks} of {plan.tasks} tasks were done before")
    result += [f"scratch of {cut.stage} reused" for cut in plan.scratch if cut.complete]
    result += plan.notes
    if plan.left_out:
        result.append(f"leaving out {len(plan.left_out)} tensors ({', '.join(sorted(set(plan.left_out.values())))})")
    return result


def page_address(job: Job, dashboard: str) -> str:
    """Return the URL of headrace's own page: beside a local cluster's dashboard, or on its own; "" where there is none."""
    if job.scheduler == "local":
        return dashboard.removesuffix("/status") + PAGE
    if job.scheduler in ("threads", "synchronous"):
        return dashboard
    return parse_listen(job.listen).url + PAGE if job.listen else ""


class ProgressLines:
    """A listener that prints a line at the start and one every LINE_SECONDS. With a watch the lines are JSON objects."""

    def __init__(self, stream: IO[str], watch: RunWatch | None = None) -> None:
        self.stream, self.watch = stream, watch
        self.done = self.total = self.resumed = 0
        self.begun = self.last = time.monotonic()

    def _say(self, event: str, text: str, **values: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) if self.watch else escaped(text)
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
        place = layer(written.name)
        text = f"{human_bytes(self.done)} of {human_bytes(self.total)}, {human_rate(rate)}, {eta:.0f} s left, {place}"
        values = {"bytes": self.done, "total_bytes": self.total, "bytes_per_second": round(rate), "eta_seconds": round(eta, 1)}
        self._say("progress", text, **values, layer=place, **(_snapshot_fields(self.watch) if self.watch else {}))

    def calibrated(self, done: int, layers: int, seconds_left: float) -> None:
        """Say that a layer is calibrated, and how long the rest may take."""
        values = {"bytes": self.done, "total_bytes": self.total, "bytes_per_second": 0, "eta_seconds": round(seconds_left, 1)}
        text = f"layer {done} of {layers} calibrated, {seconds_left:.0f} s left"
        self._say("progress", text, **values, layer=f"calibrated {done}", **(_snapshot_fields(self.watch) if self.watch else {}))

    def finished(self) -> None:
        pass


def _snapshot_fields(watch: RunWatch) -> dict[str, Any]:
    """Return the fields of a JSON line that come from a snapshot; `ranks` are [target, rank, bytes written, total bytes]."""
    now = watch.snapshot()
    return {
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


class ProgressBar:
    """A listener with rich's progress bar: bytes written (binary units), bytes per second (decimal), time left, the last layer."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        from pipeline.watching.consoles import PlainConsole

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=PlainConsole(file=stream),
        )
        self.task: Any = None

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        for note in notes(plan, dashboard, done_tasks):
            self.progress.console.print(note)
        self.task = self.progress.add_task("converting", total=total_bytes, completed=done_bytes)
        self.progress.start()

    def advanced(self, written: Written) -> None:
        self.progress.update(self.task, advance=written.bytes_written, description=printed(layer(written.name)))

    def calibrated(self, done: int, layers: int, seconds_left: float) -> None:
        """Show that a layer is calibrated, and how long the rest may take."""
        self.progress.update(self.task, description=f"layer {done} of {layers} calibrated, {seconds_left:.0f} s left")

    def finished(self) -> None:
        self.progress.stop()
