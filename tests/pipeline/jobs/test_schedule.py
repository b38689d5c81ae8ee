"""Schedules: files and what is wrong with them, and when triggers fire: time zones, summer time, what was missed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.jobs.schedule import Cron, Interval, Schedule, cron_trigger, first_time, read_schedule, trigger_of
from pipeline.model.tables import CONFIGS

BERLIN = ZoneInfo("Europe/Berlin")
SCHEDULES = sorted((CONFIGS / "schedules").glob("*.toml"))
WATCH = '[[watch]]\nname = "w"\npath = "in"\n'


def fires(text: str, start: datetime, count: int, zone: ZoneInfo = BERLIN) -> list[str]:
    """The first moments after `start`, in the zone."""
    each, found = Cron(name="x", at=text, files=("f",), timezone=zone.key), []
    trigger = trigger_of(each, Schedule())
    for _ in range(count):
        start = first_time(each, trigger, start.timestamp(), start)
        found.append(start.astimezone(UTC).astimezone(zone).strftime("%a %m-%d %H:%M %z"))
    return found


@pytest.mark.parametrize("file", SCHEDULES, ids=lambda path: path.stem)
def test_every_example_loads(file: Path) -> None:
    schedule = read_schedule(file)
    assert len(schedule.triggers) >= 3
    assert schedule.folder == file.parent
    # What its triggers name is there.
    for each in (*schedule.cron, *schedule.interval):
        assert all(list(file.parent.glob(name)) for name in each.files)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[[watch]]\nname = "w"\npath = "../in"\n[watch.job]\noutput_dir = "{model}"\n')
    (watch,) = read_schedule(tmp_path / "s.toml").watch
    assert watch.path == str(tmp_path.parent / "in")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[[cron]]\nname = 'a'\nat = '0 2 * *'\nfiles = ['f']", "cron.0.at: found '0 2 * *'; expected five fields"),
        ("[[cron]]\nname = 'a'\nat = '61 2 * * *'\nfiles = ['f']", "cron.0.at: found '61 2 * * *'; expected a line of crontab"),
        ("[[cron]]\nname = 'a'\nat = '0 0 30 2 *'\nfiles = ['f']", "found '0 0 30 2 *'; expected a moment that some year has"),
        ("[[cron]]\nname = 'a'\nat = '0 2 1 * mon'\nfiles = ['f']", "days of the month or days of the week, not both"),
        ("[[cron]]\nname = 'a'\nat = '0 2 * * someday'\nfiles = ['f']", "is no day of the week"),
        ("[[cron]]\nname = 'a'\nat = '0 2 * * *'\nfiles = ['f']\ntimezone = 'Europe/Atlantis'", "expected a time zone such as"),
        ("timezone = 3", "timezone: found 3; expected a time zone such as"),
        (
            "[[watch]]\nname = 'a'\npath = '~no-such-user/x'\n[watch.job]\noutput_dir = '{model}'",
            "watch.0.path: found '~no-such-user/x'",
        ),
        ("[[cron]]\nname = 'a b'\nat = '0 2 * * *'\nfiles = ['f']", "cron.0.name: found 'a b'"),
        ("[[cron]]\nname = 'a'\nat = '0 2 * * *'", "cron.0.files: found nothing; expected a value"),
        ("[[interval]]\nname = 'a'\nevery_seconds = 0\nfiles = ['f']", "interval.0.every_seconds: found 0"),
        (
            "[[interval]]\nname = 'a'\nevery_seconds = inf\nfiles = ['f']",
            "interval.0.every_seconds: found inf; expected 1e+09 or less",
        ),
        (f"{WATCH}every_seconds = inf\n[watch.job]\noutput_dir = '{{model}}'", "watch.0.every_seconds: found inf"),
        (f"{WATCH}settle_seconds = inf\n[watch.job]\noutput_dir = '{{model}}'", "watch.0.settle_seconds: found inf"),
        ("[[interval]]\nname = 'a'\nevery_seconds = nan\nfiles = ['f']", "interval.0.every_seconds: found nan"),
        ("[[interval]]\nname = 'a'\nevery_seconds = 9\nfiles = []", "interval.0.files: found []"),
        (
            "[[interval]]\nname = 'a'\nevery = 9\nfiles = ['f']",
            "interval.0.every: found a key that headrace does not have; expected catch_up,",
        ),
        ("[[timer]]", "timer: found a key that headrace does not have; expected cluster, cron,"),
        (WATCH, "watch.0.job: found nothing"),
        (f"{WATCH}[watch.job]\noutput_dir = 'o'", "expected an output_dir with {model} in it"),
        (f"{WATCH}[watch.job]\noutput_dir = '{{model}}'\nmodel_dir = 'x'", "expected options without model_dir"),
        (f"{WATCH}fetch_to = 'x'\n[watch.job]\noutput_dir = '{{model}}'", "fetch_to: found a key that headrace does not have"),
        ("max_memory = 'much'", "max_memory: found 'much'"),
        ("record_days = -1", "record_days: found -1"),
        ("[http]\nlisten = '8788'", "http.listen: found '8788'"),
        ("[http]\nhosts = 'me'", "http.hosts: found 'me'"),
        ("[retention]", "retention: found a key that headrace does not have"),
        ("x", "text that is not TOML"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(BadInput) as refusal:
        read_schedule(tmp_path / "s.toml")
    assert found in str(refusal.value)
    assert str(tmp_path / "s.toml") in str(refusal.value)


def test_a_day_that_few_years_have_is_one() -> None:
    assert fires("0 0 29 2 *", datetime(2096, 3, 1, tzinfo=UTC), 1) == ["Fri 02-29 00:00 +0100"]  # 2100 has none


def test_two_triggers_of_one_name_are_refused(tmp_path: Path) -> None:
    each = "name = 'a'\nfiles = ['f']\n"
    (tmp_path / "s.toml").write_text(f"[[cron]]\nat = '0 2 * * *'\n{each}[[interval]]\nevery_seconds = 9\n{each}")
    with pytest.raises(BadInput, match="a is the name of two"):
        read_schedule(tmp_path / "s.toml")


def test_summer_time_neither_loses_a_night_nor_moves_the_others() -> None:
    spring = fires("30 2 * * *", datetime(2026, 3, 28, 12, tzinfo=UTC), 3)
    # 02:30 is not there that night.
    assert spring == ["Sun 03-29 03:30 +0200", "Mon 03-30 02:30 +0200", "Tue 03-31 02:30 +0200"]
    autumn = fires("30 2 * * *", datetime(2026, 10, 24, 12, tzinfo=UTC), 3)
    # It is there twice.
    assert autumn == ["Sun 10-25 02:30 +0200", "Sun 10-25 02:30 +0100", "Mon 10-26 02:30 +0100"]


def test_a_zone_of_its_own_goes_before_the_schedules() -> None:
    schedule = Schedule(timezone="Asia/Tokyo")
    own = Cron(name="x", at="0 12 * * *", files=("f",), timezone="America/New_York")
    start = datetime(2026, 6, 1, tzinfo=UTC)
    assert first_time(own, trigger_of(own, schedule), None, start).astimezone(UTC).hour == 16
    theirs = own.model_copy(update={"timezone": None})
    assert first_time(theirs, trigger_of(theirs, schedule), None, start).astimezone(UTC).hour == 3


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("0", "Sun"),
        ("7", "Sun"),
        ("1-5", "Mon Tue Wed Thu Fri"),
        ("6-0", "Sat Sun"),
        ("5-1", "Fri Sat Sun Mon"),
        ("sat,SUN", "Sat Sun"),
        ("mon-wed,5", "Mon Tue Wed Fri"),
    ],
)
def test_days_of_the_week_are_crontabs(field: str, days: str) -> None:
    found = fires(f"0 12 * * {field}", datetime(2026, 6, 3, 12, tzinfo=UTC), len(days.split()) * 2)
    assert {each[:3] for each in found} == set(days.split())


MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))


@given(MOMENTS, st.timedeltas(timedelta(0), timedelta(days=400)), st.booleans())
def test_what_was_missed_is_made_up_for_once(fired: datetime, away: timedelta, catch_up: bool) -> None:
    now = fired + away
    daily = Cron(name="x", at="30 2 * * *", files=("f",), timezone="Europe/Berlin", catch_up=catch_up)
    trigger = trigger_of(daily, Schedule())
    first = first_time(daily, trigger, fired.timestamp(), now)
    due = cron_trigger("30 2 * * *", BERLIN).get_next_fire_time(None, fired + timedelta(microseconds=1))
    if due <= now and catch_up:
        assert first == now
    else:
        assert now < first <= now + timedelta(hours=26)
        assert first.astimezone(BERLIN).minute == 30


@given(MOMENTS, st.integers(0, 10**7), st.integers(1, 10**5), st.booleans())
def test_intervals_keep_their_beat(fired: datetime, away: int, every: int, catch_up: bool) -> None:
    now = fired + timedelta(seconds=away)
    interval = Interval(name="x", every_seconds=every, files=("f",), catch_up=catch_up)
    first = first_time(interval, trigger_of(interval, Schedule()), fired.timestamp(), now)
    if away >= every and catch_up:
        assert first == now
    else:
        assert now < first <= now + timedelta(seconds=every)
        assert round((first - fired).total_seconds() % every, 3) in (0, every)


def test_a_new_interval_begins_at_once_and_a_new_cron_waits() -> None:
    now = datetime(2026, 6, 1, 12, tzinfo=UTC)
    interval = Interval(name="x", every_seconds=60, files=("f",))
    assert first_time(interval, trigger_of(interval, Schedule()), None, now) == now
    cron = Cron(name="x", at="0 13 * * *", files=("f",))
    assert first_time(cron, trigger_of(cron, Schedule()), None, now) == now + timedelta(hours=1)
    # A clock that was set back does not keep a trigger from firing for years.
    late = first_time(interval, trigger_of(interval, Schedule()), now.timestamp() + 10**9, now)
    assert late == now + timedelta(seconds=60)
