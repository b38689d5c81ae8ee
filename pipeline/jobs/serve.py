"""The daemon: triggers ask for units, a fleet does them, and everything is taken up again after whatever has stopped it.

A trigger works in a thread of its scheduler: it has its units planned by another process, as `headrace batch --dry_run` does. What
ends the daemon ends its conversions: in order on SIGTERM, at once with a daemon that is killed. The next one finds in the history
what was under way, and asks for it again.
"""

from __future__ import annotations

import glob
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.errors import BadInput, Interrupted, Problem
from pipeline.jobs.batch import cluster
from pipeline.jobs.files import job_file, printable
from pipeline.jobs.fleet import LOST, Fleet
from pipeline.jobs.history import DAY, History
from pipeline.jobs.log import Log
from pipeline.jobs.notify import notifying
from pipeline.jobs.overview import Overview
from pipeline.jobs.planner import Planner, not_planned
from pipeline.jobs.retry import Retry
from pipeline.jobs.runs import ACTIVE, GOOD, Run
from pipeline.jobs.schedule import Cron, Interval, Schedule, Watch, first_time, trigger_of
from pipeline.jobs.units import Unit
from pipeline.jobs.watch import Arrival, Watcher
from pipeline.planning.job_file import anchored
from pipeline.planning.listen import PAGE, Listen, parse_listen
from pipeline.watching.server import serving

LISTEN = Listen(port=8788)
ONCE = Retry(attempts=1)  # of what a watch finds: it looks again
SAVE_SECONDS = 10.0  # between two records of a run's progress


class Daemon:
    """A daemon on a history, by a schedule; `stop` ends it in order."""

    def __init__(self, schedule: Schedule, history: History, log: Log) -> None:
        """Raises BadInput where a watch cannot be kept."""
        self.schedule, self.history, self.log = schedule, history, log
        self.stop = threading.Event()
        self.fleet: Fleet | None = None
        self._watchers = [(each, Watcher(each, partial(self._known, each), partial(log.say, "watch"))) for each in schedule.watch]
        self._scheduler: Any = None
        self._saved: dict[int, float] = {}
        self._again: dict[int, int] = {}  # the number of what another daemon was at, by which people know it, to its number here
        self._planner = Planner(schedule.max_memory, self.stop)

    def run(self) -> int:
        """Work until `stop` is set or the cluster is lost, in the main thread; returns the exit code.

        Raises BadInput where the history has a daemon.
        """
        schedule = self.schedule
        with ExitStack() as stack:
            stack.enter_context(self.log.of_all())
            stack.enter_context(self.history.only_one())
            workers = stack.enter_context(
                cluster(schedule.scheduler, schedule.max_jobs, schedule.max_memory, named=schedule.cluster)
            )
            seconds = {"stop_seconds": schedule.stop_seconds, "stall_seconds": schedule.stall_seconds}
            fleet = self.fleet = Fleet(workers.client, schedule.retry, first=self.history.next(), **seconds)
            fleet.listeners += [self.log, self._record]
            overview = Overview(fleet, "schedule", self._next_times, workers.dashboard)
            listen = parse_listen(schedule.http.listen) if schedule.http.listen else LISTEN
            anywhere = schedule.http.listen is None
            url = stack.enter_context(serving(listen, overview.routes(), or_any_port=anywhere, names=schedule.http.hosts))
            self.log.say("page", f"page {url}{PAGE}; Dask's dashboard {workers.dashboard}")
            if schedule.notify:
                stack.enter_context(notifying(schedule.notify, fleet))
            for number, unit, cause in self.history.unfinished():
                (again,) = fleet.add([unit], cause)
                self._again[number] = again.number
                self.history.given_up(number)
            self._scheduler = self._started(stack)
            triggers = len(schedule.cron) + len(schedule.interval) + len(schedule.watch)
            self.log.say("serving", f"serving {triggers} triggers, history {self.history.path}")
            self._work(fleet)
            if lost := fleet.lost:
                self.log.say("error", LOST)
        self.log.say("stopped", "stopped; what was under way is taken up at the next start")
        return 3 if lost else 0

    def _work(self, fleet: Fleet) -> None:
        try:
            while not self.stop.is_set() and not fleet.lost:
                for request in self.history.requests():
                    self._asked(fleet, request)
                fleet.step()
                fleet.wake.wait(0.2 if fleet.active() else 1.0)
                fleet.wake.clear()
        finally:
            self.stop.set()  # a trigger may wait to try again
            fleet.halt()
            for run in [*fleet.runs.values()]:  # for the next daemon
                if run.state == "interrupted":
                    run.state, run.ended = "queued", None
                    self.history.save(run)

    def _asked(self, fleet: Fleet, request: Mapping[str, Any]) -> None:
        """Do what `headrace jobs cancel` and `retry` ask for."""
        try:
            number, action = int(request["number"]), request["action"]
            if action == "cancel":
                fleet.cancel(self._again.get(number, number))
            elif action == "retry":
                fleet.add([Unit.of({**self.history.run(number)["unit"], "state": "to do", "error": "", "after": ""})], "retry")
        except (BadInput, KeyError, TypeError, ValueError) as error:
            self.log.say("error", f"a request: {error}")

    def _started(self, stack: ExitStack) -> Any:
        """APScheduler with all triggers, until the stack unwinds."""
        # What is late, or comes twice, is by design: it is done once.
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        timed: list[Cron | Interval] = [*self.schedule.cron, *self.schedule.interval]
        executors = {"default": ThreadPoolExecutor(len(timed) + len(self._watchers) + 1)}
        defaults = {"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
        scheduler = BackgroundScheduler(timezone=UTC, executors=executors, job_defaults=defaults)
        now = datetime.now(UTC)
        for each in timed:
            trigger, fired = trigger_of(each, self.schedule), self.history.mark("fired", each.name)
            first = first_time(each, trigger, float(fired) if fired else None, now)
            scheduler.add_job(self._guarded, trigger, (each.name, self._fire, each), next_run_time=first, name=each.name)
        for watch, watcher in self._watchers:
            every = IntervalTrigger(seconds=watch.every_seconds, timezone=UTC)
            scheduler.add_job(self._guarded, every, (watch.name, self._look, watch, watcher), next_run_time=now, name=watch.name)
        daily = ("history", self.history.forget, self.schedule.record_days)
        scheduler.add_job(self._guarded, IntervalTrigger(seconds=DAY, timezone=UTC), daily, next_run_time=now, name="-")
        scheduler.start()
        stack.callback(scheduler.shutdown)
        stack.callback(self._planner.end)
        return scheduler

    def _next_times(self) -> dict[str, str]:
        jobs = self._scheduler.get_jobs() if self._scheduler else []
        return {job.name: f"{job.next_run_time:%Y-%m-%d %H:%M:%S %Z}" for job in jobs if job.name != "-" and job.next_run_time}

    def _guarded(self, name: str, work: Callable[..., object], *arguments: Any) -> None:
        """Do a trigger's work; an error is logged, and the trigger works again the next time."""
        try:
            work(*arguments)
        except Interrupted:
            return
        except Exception as error:
            self.log.say("error", f"trigger {name}: {error or type(error).__name__}")

    def _fire(self, trigger: Cron | Interval) -> None:
        files = [name if "://" in name else str(self.schedule.folder / name) for name in trigger.files]
        self._queue(trigger.name, files, ", ".join(trigger.files), self.schedule.retry)
        self.history.set_mark("fired", trigger.name, str(time.time()))

    def _look(self, watch: Watch, watcher: Watcher) -> None:
        for arrival in watcher.look():
            try:
                settled = self._arrived(watch, arrival)
            except Interrupted:
                return
            except Exception as error:  # those behind it are to be converted
                settled = self._add(watch.name, [not_planned(watch.name, arrival.place, error)])
            if settled:
                self.history.set_mark("arrived", f"{watch.name} {printable(arrival.place)}", arrival.fingerprint)

    def _arrived(self, watch: Watch, arrival: Arrival) -> bool:
        """Ask for the units of an arrival. Returns as `_add`."""
        job = {**watch.job, "output_dir": watch.job["output_dir"].replace("{fingerprint}", arrival.fingerprint)}
        source = arrival.place if "://" in arrival.place else glob.escape(arrival.place)
        table = anchored({**job, "model_dir": source}, self.schedule.folder)
        values = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
        try:
            text = job_file(values)
        except ValueError:
            raise BadInput([Problem(f"watch {watch.name}", printable(arrival.place), "a name in UTF-8")]) from None
        file = self.history.asked / f"watch-{watch.name}-{arrival.fingerprint}.toml"
        try:
            file.write_text(f"[[matrix]]\n{text}")
            return self._queue(watch.name, [str(file)], arrival.place)
        finally:
            file.unlink(missing_ok=True)

    def _queue(self, trigger: str, names: list[str], source: str, retry: Retry = ONCE) -> bool:
        """Ask for the units of batch files; where they cannot be planned, that is recorded as a run. Returns as `_add`."""
        return self._add(trigger, self._planned(trigger, names, source, retry))

    def _add(self, trigger: str, units: list[Unit]) -> bool:
        """Ask for units. Returns whether that settles the request: false where it is to be made again, later."""
        assert self.fleet
        with self.fleet.lock:
            busy = {place for run in self.fleet.active() for place in run.unit.outputs}
            later = [unit for unit in units if unit.outputs and busy.issuperset(unit.outputs)]
            self.fleet.add([unit for unit in units if unit not in later and not self._as_before(unit)], trigger)
        return not later and all(unit.state != "failed" for unit in units)

    def _as_before(self, unit: Unit) -> bool:
        """Whether it ended the last time as it would now, so that a trigger does not record the same every minute."""
        state, error = self.history.ended_as(unit)
        return unit.state != "to do" and ((state, error) == (unit.state, unit.error) or (unit.state in GOOD and state in GOOD))

    def _planned(self, trigger: str, names: list[str], source: str, retry: Retry) -> list[Unit]:
        """The units of batch files, or the one that stands for their planning's failure. What may pass is tried again."""
        for failures in itertools.count(1):
            try:
                return self._planner.units(names)
            except Interrupted:
                raise
            except Exception as error:
                unit = not_planned(trigger, source, error)
            delay = retry.delay(unit.state, failures, passing=False)
            if delay is None:
                break
            if self.stop.wait(delay):
                raise Interrupted("stopped")
        return [unit]

    def _known(self, watch: Watch, place: str) -> str | None:
        return self.history.mark("arrived", f"{watch.name} {printable(place)}")

    def _record(self, event: str, run: Run, _said: Mapping[str, Any]) -> None:
        """Keep the history as the fleet is."""
        now = time.monotonic()
        if event != "progress" or now - self._saved.get(run.number, 0.0) > SAVE_SECONDS:
            self._saved[run.number] = now
            self.history.save(run)
        if run.state not in ACTIVE:
            self._saved.pop(run.number, None)
