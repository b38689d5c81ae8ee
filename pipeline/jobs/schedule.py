"""A schedule: the file that `headrace serve` follows, and when its triggers fire.

timezone = "Europe/Berlin"              # of cron triggers that name none
max_jobs = 2                            # and the other fields of Schedule

[[cron]]
name = "nightly"
at = "30 2 * * mon-fri"                 # minute, hour, day of the month, month, day of the week
files = ["../batches/night.toml"]       # what `headrace batch` takes

[[interval]]
name = "often"
every_seconds = 21_600
files = ["../jobs/*.toml"]

[[watch]]                               # see watch.py
name = "arrivals"
path = "/models/incoming"
[watch.job]
tp_size = [1, 2]                        # a matrix, see matrix.py
output_dir = "/ranks/{model}-tp{tp_size}"

[http]
listen = "127.0.0.1:8788"

[notify]                                # see notify.py
on = ["failure", "stall"]
apprise = { file = "/run/secrets/apprise-urls" }
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, field_validator, model_validator

from pipeline.documents import read_toml_file
from pipeline.errors import BadInput
from pipeline.jobs.files import Table, validate
from pipeline.jobs.fleet import STALL_SECONDS, STOP_SECONDS
from pipeline.jobs.notify import Notify, anchored_secrets
from pipeline.jobs.retry import Retry
from pipeline.planning.cluster_table import cluster_problems
from pipeline.planning.home import at_home
from pipeline.planning.job_file import anchored
from pipeline.planning.listen import listen_text

LONGEST_SECONDS = 1e9  # thirty years: dates have no place for what is much longer
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def _zone(value: Any) -> Any:
    try:
        return ZoneInfo(value).key
    except (KeyError, ValueError, OSError, TypeError):
        raise ValueError("a time zone such as Europe/Berlin or UTC") from None


TimeZone = Annotated[str, BeforeValidator(_zone)]
Files = Annotated[tuple[str, ...], Field(min_length=1)]


class Trigger(Table):
    """The part that all triggers share."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$", description="Its name in the store, by which it is known again.")]


class Cron(Trigger):
    """Fires at moments of the calendar. `catch_up`: once at the start, where it would have fired while no daemon ran."""

    at: str
    files: Files
    timezone: TimeZone | None = None
    catch_up: bool = True

    @field_validator("at")
    @classmethod
    def _is_cron(cls, value: str) -> str:
        if cron_trigger(value, UTC).get_next_fire_time(None, datetime.now(UTC)) is None:
            raise ValueError("a moment that some year has")
        return value


class Interval(Trigger):
    """Fires every so many seconds, the first time at the start of the first daemon that knows it."""

    every_seconds: Annotated[float, Field(ge=1, le=LONGEST_SECONDS)]
    files: Files
    catch_up: bool = True


class Watch(Trigger):
    """Looks for new checkpoints below `path`, a directory or a URL that fsspec knows, and makes jobs of them.

    `pattern`: where the checkpoints' directories are, below it. One is taken when it is whole and nothing of it has changed for
    `settle_seconds`. `job`: options as in a matrix, without the source; what is found behind a URL is read there, by ranges.
    """

    path: str
    job: dict[str, Any]
    pattern: str = "*"
    every_seconds: Annotated[float, Field(ge=0.1, le=LONGEST_SECONDS)] = 60.0
    settle_seconds: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] = 120.0

    @field_validator("path")
    @classmethod
    def _has_a_home(cls, value: str) -> str:
        at_home(value.removeprefix("file://"))
        return value

    @field_validator("job")
    @classmethod
    def _has_no_source(cls, value: dict[str, Any]) -> dict[str, Any]:
        if {"model_dir", "meta_ckpt_dir"} & set(value):
            raise ValueError("options without model_dir, which is what is found")
        if "{" not in str(value.get("output_dir", "")):
            raise ValueError("an output_dir with {model} in it")
        return value


class Http(Table):
    """Where the daemon's page is. `hosts`: names that it is asked for by, beside those that it listens as."""

    listen: Annotated[str, AfterValidator(listen_text)] | None = None
    hosts: tuple[str, ...] = ()


class Schedule(Table):
    """A schedule: a daemon's triggers and limits. Times in seconds. `folder`: the one that relative paths in it start from.

    `scheduler`: the address of a Dask cluster whose workers convert, `cluster`: the class and options of one to start, neither: one
    in the daemon's process. `record_days`: how long
    what happened is remembered.
    """

    scheduler: str | None = None
    cluster: dict[str, Any] | None = None
    timezone: TimeZone = "UTC"
    max_jobs: Annotated[int | None, Field(ge=1)] = None
    max_memory: ByteSize | None = None
    stall_seconds: Annotated[float, Field(gt=0)] = STALL_SECONDS
    stop_seconds: Annotated[float, Field(ge=0)] = STOP_SECONDS
    retry: Retry = Retry()
    record_days: Annotated[float, Field(ge=0)] = 90.0
    cron: tuple[Cron, ...] = ()
    interval: tuple[Interval, ...] = ()
    watch: tuple[Watch, ...] = ()
    http: Http = Http()
    notify: Notify | None = None
    folder: Annotated[Path, Field(exclude=True)] = Path()

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """All of them."""
        return (*self.cron, *self.interval, *self.watch)

    @model_validator(mode="after")
    def _names_differ(self) -> Schedule:
        counts = Counter(each.name for each in self.triggers)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"a name for each trigger: {twice[0]} is the name of two")
        return self


def read_schedule(file: Path) -> Schedule:
    """A schedule's file, its paths made absolute. Raises BadInput with every key that is wrong."""
    folder = file.absolute().parent
    values = read_toml_file(file, "a schedule")
    values |= {key: anchored_secrets(values[key], folder) for key in ("http", "notify") if key in values}
    values |= anchored({key: table for key, table in values.items() if key == "cluster"}, folder)
    schedule = validate(Schedule, values, str(file))
    if wrong := cluster_problems(schedule.cluster, schedule.scheduler):
        raise BadInput([replace(each, subject=f"{file}: {each.subject}") for each in wrong])
    watches = tuple(each.model_copy(update={"path": _absolute(each.path, folder)}) for each in schedule.watch)
    return schedule.model_copy(update={"folder": folder, "watch": watches})


def _absolute(path: str, folder: Path) -> str:
    path = path.removeprefix("file://")
    return path if "://" in path else os.path.normpath(folder / at_home(path))


def cron_trigger(text: str, zone: tzinfo) -> CronTrigger:
    """The moments of a crontab line. Raises ValueError saying what would do.

    APScheduler counts the days of the week from Monday, crontab from Sunday: days are handed over by name. Where crontab has both
    days restricted it fires on either, APScheduler where both agree: that is refused.
    """
    fields = text.split()
    if len(fields) != 5:
        raise ValueError("five fields: minute, hour, day of the month, month, day of the week")
    if fields[2] != "*" and fields[4] != "*":
        raise ValueError("days of the month or days of the week, not both")
    try:
        return CronTrigger.from_crontab(" ".join([*fields[:4], _week_days(fields[4])]), timezone=zone)
    except (ValueError, TypeError) as error:
        raise ValueError(f"a line of crontab ({error})") from None


def _week_days(text: str) -> str:
    """Crontab's days of the week by name: 0 and 7 are Sunday, and ranges may go past Saturday."""
    if text == "*":
        return text
    named = re.sub(r"[a-z]{3}", lambda found: str(_DAYS.index(found[0])) if found[0] in _DAYS else found[0], text.lower())
    days: list[str] = []
    for part in named.split(","):
        found = re.fullmatch(r"([0-7])(?:-([0-7]))?", part)
        if not found:
            raise ValueError(f"{part!r} is no day of the week")
        first, last = int(found[1]), int(found[2] or found[1])
        days += [_DAYS[day % 7] for day in range(first, last + 1 if last >= first else last + 8)]
    return ",".join(dict.fromkeys(days))


def trigger_of(each: Cron | Interval, schedule: Schedule) -> Any:
    """APScheduler's trigger of one of ours."""
    if isinstance(each, Cron):
        return cron_trigger(each.at, ZoneInfo(each.timezone or schedule.timezone))
    return IntervalTrigger(seconds=each.every_seconds, timezone=UTC)


def first_time(each: Cron | Interval, trigger: Any, fired: float | None, now: datetime) -> datetime:
    """When a trigger is to fire next, at the start of a daemon: now, where it has missed a moment since `fired`.

    However many it has missed, it fires once for all of them.
    """
    now = now.astimezone(UTC)  # two times of one zone compare by their clocks, which an hour in autumn shows twice
    if fired is None:
        return now if isinstance(each, Interval) else _after(trigger, now)
    last = min(datetime.fromtimestamp(fired, UTC), now)
    due = last + timedelta(seconds=each.every_seconds) if isinstance(each, Interval) else _after(trigger, last)
    if due > now:
        return due
    if each.catch_up:
        return now
    if isinstance(each, Interval):
        missed = (now - last) // timedelta(seconds=each.every_seconds)
        return last + (missed + 1) * timedelta(seconds=each.every_seconds)
    return _after(trigger, now)


def _after(trigger: Any, moment: datetime) -> datetime:
    """The first time after a moment that a cron trigger names."""
    found: datetime = trigger.get_next_fire_time(None, moment.astimezone(UTC) + timedelta(microseconds=1))
    return found
