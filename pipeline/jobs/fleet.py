"""A fleet of conversions: units as tasks of a Dask cluster, each in the memory that its plan needs, and what came of each.

A worker offers `MEMORY` in bytes and, where it has GPUs, `GPU`; Dask gives it no more than that at a time. An attempt that may yet
succeed is made again as a new task: while it waits it holds nothing. What is done is known from the outputs themselves, so that
nothing here needs to outlive the process.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.jobs.retry import Retry
from pipeline.jobs.runs import ACTIVE, CODES, Listener, Run, State
from pipeline.jobs.tasks import Here, There, lost
from pipeline.jobs.units import Unit
from pipeline.sinks.output_checks import check_space
from pipeline.tensor.system_errors import sentence
from pipeline.watching.units import human_bytes

STEP_SECONDS = 0.2
STOP_SECONDS = 60.0  # for conversions to end in order
STALL_SECONDS = 600.0
LOST = "the cluster's scheduler was lost; it goes on from there on another"
_PLANNED_CODES = {"refused": 2, "failed": 3, "crashed": 1}


class Fleet:
    """Runs on a cluster. `step` is called again and again from one thread; everything else is safe from any."""

    def __init__(
        self,
        client: Any,
        retry: Retry | None = None,
        *,
        stop_seconds: float = STOP_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        first: int = 1,
    ) -> None:
        """`client`: of the cluster that units run on. `first`: the number of the first run."""
        self.client, self.retry = client, retry or Retry()
        self.stop_seconds, self.stall_seconds = stop_seconds, stall_seconds
        self.runs: dict[int, Run] = {}
        self.lock = threading.RLock()
        self.wake = threading.Event()
        self.listeners: list[Listener] = []
        self.topic = f"headrace-{uuid.uuid4().hex[:12]}"
        self._next, self._halting = first, False
        self._inbox: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._here = ThreadPoolExecutor(64, "headrace-driver")
        if client is not None:  # there is something to do
            client.subscribe_topic(self.topic, lambda event: self._inbox.put(event[1]))

    def add(self, units: Iterable[Unit], cause: str) -> list[Run]:
        """Take units in; those that are not to be done end at once."""
        made = []
        with self.lock:
            for unit in units:
                run = Run(self._next, unit, cause)
                self._next += 1
                self.runs[run.number] = run
                made.append(run)
                self._tell("queued", run)
                if unit.state != "to do":
                    self._end(run, unit.state, _PLANNED_CODES.get(unit.state, 0), unit.error)
        self.wake.set()
        return made

    def cancel(self, number: int) -> None:
        """Cancel a run: at once where it waits, in order where it runs. What it has written stays. Raises BadInput."""
        with self.lock:
            run = self.runs.get(number)
            if run is None or run.state not in ACTIVE:
                raise BadInput([Problem(f"job {number}", "none that waits or runs", "one that does")])
            run.cancelled = True
            if run.task is None:
                self._end(run, "cancelled", 3, "it was cancelled before it began")
            else:
                self._drop(run)
        self.wake.set()

    @property
    def lost(self) -> bool:
        """Whether the cluster's scheduler is gone for good, so that nothing can be done any more."""
        return self.client is not None and lost(self.client)

    def active(self) -> list[Run]:
        """The runs that wait or run."""
        with self.lock:
            return [run for run in self.runs.values() if run.state in ACTIVE]

    def work(self, stop: threading.Event, until_idle: bool) -> None:
        """Work until `stop` is set, the cluster is lost, or, with `until_idle`, none is active; what runs is stopped in order."""
        try:
            while not stop.is_set() and not self.lost:
                self.step()
                if until_idle and not self.active():
                    return
                self.wake.wait(STEP_SECONDS)
                self.wake.clear()
        finally:
            self.halt()

    def step(self) -> None:
        """Look at everything once."""
        while True:
            try:
                self._heard(self._inbox.get_nowait())
            except Empty:
                break
        with self.lock:
            for run in self.active():
                if run.task is not None and run.task.done():
                    self._came(run)
            for run in self.active():
                if run.state == "running" and not run.stalled and time.monotonic() - run.moved > self.stall_seconds:
                    run.stalled = True
                    self._tell("stalled", run, {"seconds": time.monotonic() - run.moved})
            self._submit()

    def halt(self) -> None:
        """Stop what runs, in order, and end all that is active as interrupted."""
        self._halting = True
        end = time.monotonic() + self.stop_seconds + 10
        with self.lock:
            for run in self.active():
                if run.task is not None:
                    self._drop(run)
        while time.monotonic() < end and any(run.task is not None and not run.task.done() for run in self.active()):
            self.step()
            time.sleep(STEP_SECONDS / 4)
        with self.lock:
            for run in self.active():
                self._end(run, "interrupted", 3, LOST if self.lost else "the batch was stopped before it had ended")
        self._here.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        """Give what is due to the cluster, in order, as long as the disks have room for all that is on its way."""
        on_its_way = [run for run in self.active() if run.task is not None]
        names = {run.unit.name for run in self.active()}
        for run in self.active():
            if run.task is not None or run.not_before > time.time() or self._halting:
                continue
            if run.unit.after in names:
                continue
            try:
                if not self._begin(run, on_its_way):
                    return
            except OSError as error:  # such as a mount that has gone stale: the others' are as they were
                self._over(run, {"code": 3, "error": sentence(error), "passing": True})
            except Exception as error:
                if self.lost:
                    return
                self._over(run, {"code": 1, "error": "".join(traceback.format_exception(error))})
            if run.task is not None:
                on_its_way.append(run)

    def _begin(self, run: Run, on_its_way: list[Run]) -> bool:
        """Give a run to the cluster, or end it where it can never begin. Returns whether those behind it may begin."""
        try:
            full = _without_room([*on_its_way, run])
        except OSError:  # of a place of its own it is raised again; one on its way says its own
            full = _without_room([run])
        if full and on_its_way:
            return False  # those behind it must not keep it from ever having room
        if full:
            self._over(run, {"code": 2, "error": str(BadInput(full)), "passing": True})
            return True
        kind, options = run.unit.steps()[run.step]
        if options.get("cluster") or str(options.get("scheduler", "")).startswith(("tcp://", "tls://")):
            run.task = Here(self._here, self._inbox.put, run.number, options, self.stop_seconds)
            return True
        resources = {"GPU": 1.0} if kind == "build" else {"MEMORY": float(run.unit.peak_memory_bytes)}
        if (unable := self._unable(resources)) is None:
            return True  # no worker is there yet
        if unable:
            self._over(run, {"code": 2, "error": str(BadInput(unable)), "passing": False})
            return True
        attempt = len(run.attempts) + 1
        key = (run.unit.name, f"{self.topic}-{run.number}-{attempt}")
        run.task = There(self.client, key, resources, (run.number, attempt, options, self.topic, self.stop_seconds))
        return True

    def _unable(self, needed: Mapping[str, float]) -> list[Problem] | None:
        """Why no worker can ever take a task; empty where one can, None where there is no worker."""
        workers = self.client.scheduler_info(n_workers=-1).get("workers", {}).values()
        if not workers:
            return None
        problems = []
        for name, amount in needed.items():
            most = max((worker["resources"].get(name, 0.0) for worker in workers), default=0.0)
            if most < amount:
                shown, has = (human_bytes(int(each)) if name == "MEMORY" else f"{each:g}" for each in (amount, most))
                found = f"workers that offer at most {has} of {name}" if most else f"no worker that offers {name}"
                remedy = f"Start one with dask worker --resources {name}={amount:.0f}, or give a smaller --memory_limit"
                problems.append(Problem(name, found, f"one with {shown}", remedy))
        return problems

    def _heard(self, event: Mapping[str, Any]) -> None:
        """Take in what a process says of its run."""
        with self.lock:
            run = self.runs.get(int(event.get("run", 0)))
            if run is None or run.state not in ACTIVE:
                return
            kind = event.get("event")
            if kind == "over":  # of this attempt: the word of one before may come when its result has long been here
                if run.task is not None and event["attempt"] == len(run.attempts) + 1:
                    run.task.said = event["result"]
            elif kind == "began":
                run.state, run.place, run.stalled, run.moved = "running", event, False, time.monotonic()
                run.started = run.started or time.time()
                self._tell("started", run, {"attempt": len(run.attempts) + 1, **event})
            elif kind == "started":
                run.place = {**run.place, **{name: event.get(name, "") for name in ("page", "dashboard")}}
            elif kind == "progress":
                # A calibration writes no ranks meanwhile.
                if any(event.get(name) != run.progress.get(name) for name in ("bytes", "calibrated_layers")):
                    run.moved, run.stalled = time.monotonic(), False
                run.progress = event
                self._tell("progress", run, event)

    def _came(self, run: Run) -> None:
        """Take in that a task has ended, with its process's result or without."""
        assert run.task
        result = run.task.result()
        run.attempts.append(result)
        run.task = None
        if result["code"] == 0 and run.step + 1 < len(run.unit.steps()):
            run.step, run.failures = run.step + 1, 0
            return
        self._over(run, result)

    def _over(self, run: Run, result: Mapping[str, Any]) -> None:
        """End a run as its last attempt says, or have it tried again."""
        code, error = result["code"], result.get("error", "")
        outcome: State = "failed" if code < 0 else CODES.get(code, "crashed")
        if run.cancelled and outcome == "failed":
            outcome = "cancelled"
        elif self._halting and outcome == "failed":
            outcome = "interrupted"
        run.failures += outcome in ("failed", "refused")
        delay = None if self._halting else self.retry.delay(outcome, run.failures, bool(result.get("passing")))
        if delay is not None:
            run.state, run.not_before, run.error = "waiting", time.time() + delay, error
            self._tell("retried", run, {"outcome": outcome, "error": error, "seconds": delay})
            return
        if outcome == "refused" and run.unit.parts:
            outcome = "split"
            parts = [replace(part, state="to do", error="") for part in run.unit.parts]
            self._end(run, outcome, 2, error)
            run.parts = [part.number for part in self.add(parts, run.cause)]
            return
        if outcome == "done" and all(each.get("up_to_date") for each in run.attempts if each["code"] == 0):
            outcome = "up_to_date"
        self._end(run, outcome, 3 if code < 0 or (outcome == "refused" and result.get("passing")) else code, error)

    def _end(self, run: Run, state: State, code: int, error: str) -> None:
        run.state, run.exit_code, run.error, run.ended, run.task = state, code, error, time.time(), None
        self._tell("ended", run)

    def _drop(self, run: Run) -> None:
        """Have the cluster give up a run's task: its process ends in order."""
        assert run.task
        if run.state == "running":
            run.task.stop()
        else:
            run.task.forget()
            self._end(run, "interrupted" if self._halting else "cancelled", 3, "it was stopped before it began")

    def _tell(self, event: str, run: Run, said: Mapping[str, Any] | None = None) -> None:
        for listener in self.listeners:
            try:
                listener(event, run, said or {})
            except Exception:
                logging.getLogger(__name__).exception("a listener failed on %s", event)


def _without_room(runs: Iterable[Run]) -> list[Problem]:
    """The disks that have no room for all of these. Raises OSError where one does not say."""
    return check_space({Path(place): nbytes for each in runs for place, nbytes in each.unit.room.items()})
