"""The daemon: triggers queue jobs, the runner does them, and everything is taken up again after whatever has stopped it.

A trigger works in a thread of its scheduler: it has the jobs planned by another process, and queues them. Conversions are begun by
the main thread alone. What ends the daemon ends its conversions: in order on SIGTERM, at once with a daemon that is killed. The
next one finds in the store what was under way, and goes on with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.errors import HeadraceError, Interrupted
from pipeline.jobs.aside import Aside
from pipeline.jobs.events import Hub
from pipeline.jobs.files import printable
from pipeline.jobs.limits import Limits
from pipeline.jobs.lock import only_one
from pipeline.jobs.log import Log
from pipeline.jobs.recovery import recover
from pipeline.jobs.retention import DAY, collect
from pipeline.jobs.rows import Conversion, Unit
from pipeline.jobs.runner import Runner
from pipeline.jobs.schedule import Cron, Interval, Schedule, Trigger, Watch, first_time, trigger_of
from pipeline.jobs.store import SERVE, JobStore
from pipeline.jobs.submit import submit
from pipeline.jobs.watch import Arrival, Watcher

Service = Callable[["Daemon"], AbstractContextManager[Any]]


class Daemon:
    """A daemon on a store. `services` are entered before the first job and left after the last: pages, metrics, notifiers."""

    def __init__(self, schedule: Schedule, store: JobStore, log: Log | None = None) -> None:
        """Raises BadInput where a watch cannot be kept."""
        self.schedule, self.store, self.log = schedule, store, log
        self.hub, self.stop, self.services = Hub(), threading.Event(), list[Service]()
        self._aside = Aside()
        self._watchers = [(each, Watcher(each, self._known(each))) for each in schedule.watch]
        if log:
            self.hub.subscribe(log)
        limits = Limits.of(schedule.max_jobs, schedule.max_memory)
        seconds = (schedule.stall_seconds, schedule.stop_seconds)
        self.runner = Runner(store, self.hub, store.register("serve").id, SERVE, limits, schedule.retry, *seconds)

    def run(self) -> int:
        """Work until `stop` is set, in the main thread; returns the exit code. Raises BadInput where the store has a daemon."""
        lock = self.store.path.with_name(f"{self.store.path.name}.lock")
        with ExitStack() as stack:
            stack.callback(self.store.end_worker, self.runner.worker)
            stack.enter_context(only_one(lock))
            recover(self.store)
            for service in self.services:
                stack.enter_context(service(self))
            scheduler = self._scheduler()
            stack.callback(scheduler.shutdown)
            stack.callback(self._aside.close)
            scheduler.start()
            self._say("serving", f"serving {len(self.schedule.triggers)} triggers, store {self.store.path}")
            self.runner.work(self.stop, until_idle=False)
        self._say("stopped", "stopped; what was under way is taken up at the next start")
        return 0

    def _scheduler(self) -> Any:
        # What is late, or comes twice, is by design: it is done once.
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        threads = ThreadPoolExecutor(len(self.schedule.triggers) + 1)
        defaults = {"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
        scheduler = BackgroundScheduler(timezone=UTC, executors={"default": threads}, job_defaults=defaults)
        now = datetime.fromtimestamp(self.store.clock(), UTC)
        timed: list[Cron | Interval] = [*self.schedule.cron, *self.schedule.interval]
        for each in timed:
            trigger = trigger_of(each, self.schedule)
            first = first_time(each, trigger, self.store.fired(each.name), now)
            scheduler.add_job(self._guarded, trigger, (each.name, self._fire, each), next_run_time=first)
        for watch, watcher in self._watchers:
            every = IntervalTrigger(seconds=watch.every_seconds, timezone=UTC)
            scheduler.add_job(self._guarded, every, (watch.name, self._look, watch, watcher), next_run_time=now)
        collecting = ("retention", collect, self.store, self.schedule.retention)
        scheduler.add_job(self._guarded, IntervalTrigger(seconds=DAY, timezone=UTC), collecting, next_run_time=now)
        return scheduler

    def _guarded(self, name: str, work: Callable[..., object], *arguments: Any) -> None:
        """Do a trigger's work; an error is logged, and the trigger works again the next time."""
        try:
            work(*arguments)
        except Interrupted:
            return
        except Exception as error:
            self._say("error", f"trigger {name}: {error or type(error).__name__}")

    def _fire(self, trigger: Cron | Interval) -> None:
        self._queue(trigger, {"names": list(trigger.files)}, ", ".join(trigger.files))
        self.store.set_fired(trigger.name, self.store.clock())

    def _look(self, watch: Watch, watcher: Watcher) -> None:
        for arrival in watcher.look():
            source = self._fetched(watch, arrival)
            job = {**watch.job, "output_dir": watch.job["output_dir"].replace("{fingerprint}", arrival.fingerprint)}
            where = f"watch.{watch.name}.job"
            self._queue(watch, {"matrix": {"model_dir": [source], **job}, "where": where}, arrival.place)
            self.store.set_arrival(watch.name, printable(arrival.place), arrival.fingerprint)

    def _fetched(self, watch: Watch, arrival: Arrival) -> str:
        """Where the checkpoint is on this machine."""
        if watch.fetch_to is None:
            return arrival.place
        directory = f"{watch.fetch_to}/{arrival.fingerprint}/{arrival.name}"
        self._say("fetching", f"trigger {watch.name}: fetching {arrival.place} to {directory}")
        self._aside.run("pipeline.jobs.fetch", {"url": arrival.place, "directory": directory})
        return directory

    def _queue(self, trigger: Trigger, request: dict[str, Any], source: str) -> None:
        """Queue the jobs that a trigger asks for. An error in the whole of it is recorded as a refused run."""
        bounds = {"folder": str(self.schedule.folder), "max_memory": self.schedule.max_memory}
        try:
            units = self._aside.units({**bounds, **request})
        except Interrupted:
            raise
        except HeadraceError as error:
            nothing = Conversion(trigger.name, source, (), {"trigger": trigger.name, "source": source}, (), {}, 0)
            units = [Unit(nothing, (trigger.name,), error=str(error))]
        submit(self.store, self.hub, units, SERVE, trigger.name, repeat=False)
        self.runner.wake.set()

    def _known(self, watch: Watch) -> Callable[[str], str | None]:
        return lambda place: self.store.arrival(watch.name, printable(place))

    def _say(self, event: str, text: str) -> None:
        if self.log:
            self.log.say(event, text)
