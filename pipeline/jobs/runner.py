"""Does the runs of a queue: starts conversions as the limits allow, follows and stops them, and tries again what may succeed.

One thread does all of it, step by step, so that the store never differs for long from the processes that really run.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.jobs.conversion import Process
from pipeline.jobs.events import Hub, JobFinished, JobQueued, JobStarted, Outcome, Progress, Stalled
from pipeline.jobs.files import write_job
from pipeline.jobs.leases import HEARTBEAT_SECONDS
from pipeline.jobs.limits import Limits
from pipeline.jobs.recovery import recover, take_over
from pipeline.jobs.retention import release
from pipeline.jobs.retry import Retry
from pipeline.jobs.rows import GOOD, AttemptRow, RunRow, State
from pipeline.jobs.store import SERVE, JobStore

BUSY_SECONDS, IDLE_SECONDS = 0.2, 1.0  # between two steps
STALL_SECONDS = 600.0
STOP_SECONDS = 60.0
_SIZES = ("bytes", "total_bytes", "memory_bytes", "memory_limit_bytes", "tasks", "done_tasks")
_FIGURES = (*_SIZES, "bytes_per_second", "eta_seconds", "layer")

Start = Callable[[Path, Callable[[Mapping[str, Any]], None]], Process]


@dataclass
class _Running:
    """A conversion under way."""

    run: RunRow
    attempt: AttemptRow
    process: Process
    file: Path
    cancelled: bool = False
    stalled: float = field(default=0.0)  # the moment of its last progress, where that was said to be too long ago


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: its exit code, what was wrong, and the process, where there was one."""

    outcome: Outcome
    code: int
    error: str
    process: Process | None = None

    @property
    def passing(self) -> bool:
        """Whether what was wrong may pass."""
        return self.process is not None and self.process.passing

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes written, and in all."""
        return (self.process.done_bytes, self.process.total_bytes) if self.process else (0, 0)

    @property
    def figures(self) -> dict[str, Any]:
        """The measurements of the process, by the names of the store's columns."""
        said = self.process.finished if self.process else {}
        names = ("bytes_read", "bytes_written", "peak_memory_bytes")
        found: dict[str, Any] = {name: said.get(name, 0) for name in names}
        seconds, stages = (self.process.seconds, dict(self.process.stages)) if self.process else (0.0, {})
        return {**found, "seconds": seconds, "by_stage": stages}


class Runner:
    """Does the runs of `queue` for a worker.

    All calls of `step` must come from one thread, and it must live on: the conversions end when it ends.
    """

    def __init__(
        self,
        store: JobStore,
        hub: Hub,
        worker: str,
        queue: str,
        limits: Limits,
        retry: Retry | None = None,
        stall_seconds: float = STALL_SECONDS,
        stop_seconds: float = STOP_SECONDS,
        start: Start = Process,
    ) -> None:
        self.store, self.hub, self.worker, self.queue, self.limits = store, hub, worker, queue, limits
        self.retry = retry or Retry()
        self.stall_seconds, self.stop_seconds = stall_seconds, stop_seconds
        self.start = start
        self.wake = threading.Event()
        self._running: dict[int, _Running] = {}
        self._announced: set[int] = set()
        self._stopping = False
        self._beat = -HEARTBEAT_SECONDS  # by time.monotonic()

    @property
    def running(self) -> int:
        """How many conversions are under way."""
        return len(self._running)

    def work(self, stop: threading.Event, until_idle: bool) -> None:
        """Work until `stop` is set, or, with `until_idle`, until nothing waits any more; what runs then is stopped in order."""
        try:
            while not stop.is_set():
                self.step()
                if until_idle and not self._running and not self.store.queue(self.queue):
                    return
                self.wake.wait(BUSY_SECONDS if self._running or until_idle else IDLE_SECONDS)
                self.wake.clear()
        finally:
            self.halt()

    def step(self) -> None:
        """Look at everything once."""
        for each in list(self._running.values()):
            code = each.process.poll()
            if code is not None:
                self._ended(each, code)
        self._heartbeat()
        self._cancel()
        self._notice_stalls()
        self._begin()

    def halt(self) -> None:
        """Stop what runs: what it has done is kept, and it can be taken up again. Those that do not end in time are killed."""
        self._stopping = True
        for each in self._running.values():
            each.process.stop()
        began = time.monotonic()
        while self._running:
            late = time.monotonic() - began >= self.stop_seconds
            for each in list(self._running.values()):
                code = each.process.kill() if late else each.process.poll()
                if code is not None:
                    self._ended(each, code)
            self._heartbeat()
            time.sleep(0.02)

    def _heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._beat < HEARTBEAT_SECONDS:
            return
        self._beat = now
        progress = {number: (each.process.done_bytes, each.process.total_bytes) for number, each in self._running.items()}
        for number in self.store.heartbeat(self.worker, progress):
            each = self._running.pop(number)
            each.process.kill()
            ended = Ended("interrupted", 3, "another process took it over, as this one had not been heard of", each.process)
            self._say_finished(each.run, each.attempt, ended, ended.outcome, None)
        recover(self.store)

    def _cancel(self) -> None:
        for number in self.store.cancellations(self.worker) if self._running else ():
            each = self._running.get(number)
            if each and not each.cancelled:
                each.cancelled = True
                each.process.stop()

    def _notice_stalls(self) -> None:
        for each in self._running.values():
            moved = each.process.moved
            if each.stalled != moved and time.monotonic() - moved > self.stall_seconds:
                each.stalled = moved
                done, total, seconds = each.process.done_bytes, each.process.total_bytes, time.monotonic() - moved
                self.hub.publish(Stalled(*self._of(each.run), each.attempt.number, seconds, done, total))

    def _begin(self) -> None:
        now, waiting = self.store.clock(), self.store.queue(self.queue)
        for run in waiting:
            if run.id not in self._announced:
                self._announced.add(run.id)
                self.hub.publish(JobQueued(*self._of(run), run.outputs, run.cause))
        for run in waiting:
            if run.not_before > now:
                continue
            if not self.limits.allow(run, [each.run for each in self._running.values()]):
                return  # those behind it must not keep it from ever having room
            claimed = self.store.claim(run.id, self.worker)
            if isinstance(claimed, AttemptRow):
                self._start(run, claimed)
            elif take_over(self.store, claimed, self._running):
                self.wake.set()

    def _start(self, run: RunRow, attempt: AttemptRow) -> None:
        file = self.store.path.with_name(f"{self.store.path.name}.d") / f"run-{run.id}.toml"
        try:
            write_job(file, self.store.job(run.job).options)
            made = self.start(file, lambda event: self._heard(run, attempt, event))
        except OSError as error:  # a full disk here, or no room for one more process
            self._end(run, attempt, Ended("failed", 3, str(error)))
            return
        if not self.store.began(attempt.id, made.pid):
            made.kill()
            file.unlink(missing_ok=True)
            return
        self._running[attempt.id] = _Running(run, attempt, made, file)
        self.hub.publish(JobStarted(*self._of(run), run.outputs, attempt.number, made.pid))
        made.go()

    def _heard(self, run: RunRow, attempt: AttemptRow, event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            values = {name: event[name] for name in _FIGURES if name in event}
            ranks = tuple((str(target), *sizes) for target, *sizes in event.get("ranks", ()))
            self.hub.publish(Progress(*self._of(run), attempt=attempt.number, **values, by_stage=event["stages"], ranks=ranks))

    def _ended(self, each: _Running, code: int) -> None:
        """Take in that a process has ended by itself, or as it was asked to."""
        del self._running[each.attempt.id]
        each.file.unlink(missing_ok=True)
        error = each.process.report() if code else ""
        if code < 0:
            error = f"ended by {signal.Signals(-code).name}" + (f"\n{error}" if error else "")
        self._end(each.run, each.attempt, Ended(self._outcome(each, code), 3 if code < 0 else code, error, each.process))

    def _outcome(self, each: _Running, code: int) -> Outcome:
        if code == 0:
            return "up_to_date" if each.process.finished.get("up_to_date") else "done"
        if code == 2:
            return "refused"
        if each.cancelled:
            return "cancelled"
        if self._stopping:
            return "interrupted"
        return "failed" if code == 3 or code < 0 else "crashed"

    def _end(self, run: RunRow, attempt: AttemptRow, ended: Ended) -> None:
        """Record how an attempt ended and what becomes of its run, and tell."""
        outcome = ended.outcome
        failures = int(outcome in ("failed", "refused"))
        delay = self.retry.delay(outcome, run.failures + failures, ended.passing)
        state: State = outcome
        if outcome == "interrupted" and self.queue == SERVE:
            state = "queued"  # the daemon takes it up again
        elif delay is not None:
            state = "waiting"
        elif outcome == "refused" and run.parts:
            outcome = state = "split"
            # They wait for what this attempt holds. Were it to be lost now, they would be found queued the next time.
            for part in self.store.conversion(run).split():
                self.store.enqueue(part, self.queue, run.cause)
        when = self.store.clock() + (delay or 0.0)
        found = {"outcome": outcome, "exit_code": ended.code, "error": ended.error, **ended.figures}
        if self.store.finish(attempt.id, state, ended.progress, not_before=when, failures=failures, **found):
            self._say_finished(run, attempt, ended, outcome, delay)
            if state in GOOD:
                release(self.store, self.store.run(run.id))

    def _say_finished(self, run: RunRow, attempt: AttemptRow, ended: Ended, outcome: Outcome, delay: float | None) -> None:
        found = ended.figures
        event = JobFinished(
            *self._of(run),
            outputs=run.outputs,
            attempt=attempt.number,
            outcome=outcome,
            exit_code=ended.code,
            seconds=found["seconds"],
            bytes=found["bytes_written"],
            bytes_read=found["bytes_read"],
            peak_memory_bytes=found["peak_memory_bytes"],
            error=ended.error,
            retry_seconds=delay,
            by_stage=found["by_stage"],
        )
        self.hub.publish(event)

    def _of(self, run: RunRow) -> tuple[float, int, int, str]:
        """The first fields of every event of this run: time, job, run and name."""
        return self.store.clock(), run.job, run.id, run.name
