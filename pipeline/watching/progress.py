"""What a run shows while it works: a live bar on a terminal, plain or JSON lines elsewhere, or nothing."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import IO, TYPE_CHECKING, Any, Literal

from pipeline.planning.listen import PAGE, parse_listen
from pipeline.watching.listener import Listener, Silent
from pipeline.watching.units import human_bytes

if TYPE_CHECKING:
    from pipeline.planning.job import Job
    from pipeline.planning.plans import Plan
    from pipeline.watching.state import Watch
    from stages.write import Written

LogFormat = Literal["text", "json"]
LINE_SECONDS = 2.0  # between two lines of progress where there is no terminal

_LAYER = re.compile(r"(?:transformer\.)?(layers\.\d+|[\w.]+?)(?:\.|$)")


def listener(quiet: bool, log_format: LogFormat, watch: Watch, stream: IO[str] | None = None) -> Listener:
    """The listener for a stream (standard error by default): a bar where it is a terminal, lines where not; JSON from a watch."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    if log_format == "json":
        return Lines(stream, watch)
    return Bar(stream) if stream.isatty() else Lines(stream)


def layer(name: str) -> str:
    """The part of a tensor's name that says how far a run is: `layers.3`, `vocab_embedding`, `lm_head`."""
    found = _LAYER.match(name)
    return found[1] if found else name


def notes(plan: Plan, dashboard: str, done_tasks: int) -> list[str]:
    """What is worth saying at the start of a run, beside how long it will take."""
    result = [f"dashboard {dashboard}"] if dashboard else []
    page = page_address(plan.job, dashboard)
    result += [f"page {page}"] if page not in ("", dashboard) else []
    if done_tasks:
        result.append(f"resuming: {done_tasks} of {plan.tasks} tasks were done before")
    result += [f"scratch of {cut.stage} reused" for cut in plan.scratch if cut.complete]
    result += plan.notes
    if plan.left_out:
        result.append(f"leaving out {len(plan.left_out)} tensors ({', '.join(sorted(set(plan.left_out.values())))})")
    return result


def page_address(job: Job, dashboard: str) -> str:
    """Where headrace's own page is: beside the dashboard of a cluster in this process, or where `listen` says; "" for nowhere."""
    if job.scheduler == "local":
        return dashboard.removesuffix("/status") + PAGE
    return parse_listen(job.listen).url + PAGE if job.listen else ""


class Lines:
    """A line at the start, then one every few seconds; each whole in itself. Where there is a watch, JSON with what it sees."""

    def __init__(self, stream: IO[str], watch: Watch | None = None) -> None:
        self.stream, self.watch = stream, watch
        self.done = self.total = self.resumed = 0
        self.begun = self.last = time.monotonic()

    def _say(self, event: str, text: str, **values: Any) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) if self.watch else text
        print(line, file=self.stream, flush=True)

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        self.total, self.done, self.resumed, self.begun = total_bytes, done_bytes, done_bytes, time.monotonic()
        text = f"converting {plan.source.location} in {plan.tasks} tasks"
        for part in notes(plan, dashboard, done_tasks):
            text += f"; {part}"
        values = {"tasks": plan.tasks, "done_tasks": done_tasks, "bytes": total_bytes, "done_bytes": done_bytes}
        places = {"dashboard": dashboard, "page": page_address(plan.job, dashboard)}
        self._say("started", text, source=str(plan.source.location), **values, **places, left_out=len(plan.left_out))

    def advanced(self, written: Written) -> None:
        self.done += written.bytes_written
        now = time.monotonic()
        if now - self.last < LINE_SECONDS and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.resumed) / max(now - self.begun, 1e-9)
        eta = (self.total - self.done) / max(rate, 1)
        place = layer(written.name)
        text = f"{human_bytes(self.done)} of {human_bytes(self.total)}, {rate / 1e9:.2f} GB/s, {eta:.0f} s left, {place}"
        values = {"bytes": self.done, "total_bytes": self.total, "bytes_per_second": round(rate), "eta_seconds": round(eta, 1)}
        self._say("progress", text, **values, layer=place, **(_seen(self.watch) if self.watch else {}))

    def finished(self) -> None:
        pass


def _seen(watch: Watch) -> dict[str, Any]:
    """What a line of JSON says beside bytes and time: `ranks` are [target, rank, bytes written, bytes in all]."""
    now = watch.snapshot()
    return {
        "tasks": now.tasks,
        "done_tasks": now.done_tasks,
        "memory_bytes": now.memory_bytes,
        "memory_limit_bytes": now.memory_limit_bytes,
        "stages": {stage: {unit: round(value, 6) for unit, value in totals.items()} for stage, totals in now.stages.items()},
        "ranks": [[share.target, share.rank, share.done_bytes, share.total_bytes] for share in now.ranks],
    }


class Bar:
    """rich's progress bar: bytes, GB/s, time left, and the layer that the last task ended in."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self.task: Any = None

    def started(self, plan: Plan, dashboard: str, total_bytes: int, done_bytes: int, done_tasks: int) -> None:
        for note in notes(plan, dashboard, done_tasks):
            self.progress.console.print(note, highlight=False)
        self.task = self.progress.add_task("converting", total=total_bytes, completed=done_bytes)
        self.progress.start()

    def advanced(self, written: Written) -> None:
        self.progress.update(self.task, advance=written.bytes_written, description=layer(written.name))

    def finished(self) -> None:
        self.progress.stop()
