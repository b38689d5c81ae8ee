"""Removes what has been kept for long enough: the scratch of runs that failed, and old records of the store."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.errors import BadInput
from pipeline.jobs.files import Table
from pipeline.jobs.rows import GOOD, RunRow
from pipeline.jobs.store import JobStore
from pipeline.sinks.scratch import DEFAULT_ROOT
from pipeline.sinks.scratch_listing import remove_scratch

DAY = 86_400.0


class Retention(Table):
    """How many days the scratch of failed runs and the records of ended runs are kept."""

    failed_scratch_days: Annotated[float, Field(ge=0)] = 7.0
    record_days: Annotated[float, Field(ge=0)] = 90.0


@dataclass(frozen=True)
class Collected:
    """The result of `collect`: places of the scratch that was removed (or would be), and the number of runs forgotten."""

    scratch: tuple[str, ...]
    runs: int


def collect(store: JobStore, retention: Retention, dry_run: bool = False) -> Collected:
    """Remove the scratch that runs left long ago and no other may still use; forget runs that ended long ago.

    What a run that failed leaves is for its next attempt. A run is not forgotten while its scratch is there. Output directories,
    whole or not, are never touched.
    """
    now = store.clock()
    runs = store.runs(limit=None)
    due, old = now - retention.failed_scratch_days * DAY, now - retention.record_days * DAY
    wanted = {place for run in runs if run.ended is None or run.ended > due for place in run.scratch}
    places = sorted({place for run in runs for place in run.scratch} - wanted)
    if dry_run:
        forgotten = [run for run in runs if run.ended and run.ended < old and set(run.scratch) <= set(places)]
        return Collected(tuple(places), len(forgotten))
    removed = [place for place in places if remove_cut(place)]
    for place in removed:
        store.drop_scratch(place)
    return Collected(tuple(removed), store.forget(old))


def release(store: JobStore, run: RunRow) -> None:
    """After a run that ended well: remove the cuts that it shared with others, where all of these have ended well too."""
    latest = {each.job: each for each in reversed(store.runs(limit=None)) if run.scratch}
    for place in run.scratch:
        if all(each.state in GOOD for each in latest.values() if place in each.scratch) and remove_cut(place):
            store.drop_scratch(place)


def remove_cut(place: str) -> bool:
    """Remove a cut, where it is; False where a job is at work on it."""
    if "://" in place:
        import fsspec

        files, path = fsspec.core.url_to_fs(place)
        if files.exists(path):
            files.rm(path, recursive=True)
        return True
    path = Path(place)
    if path.exists():
        try:
            remove_scratch(path.parent, [path.name])
        except BadInput:
            return False
    if path.parent.name == DEFAULT_ROOT:
        with contextlib.suppress(OSError):  # other cuts are in it
            path.parent.rmdir()
    return True
