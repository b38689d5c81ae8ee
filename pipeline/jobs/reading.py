"""Reads the store: jobs, runs, attempts and counts, as frozen rows.

From any thread and any process; readers do not wait for writers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from pipeline.errors import BadInput, Problem
from pipeline.jobs.rows import BAD, STATES, AttemptRow, JobRow, RunRow, State, WorkerRow
from pipeline.jobs.tables import attempts, jobs, open_database, runs, workers

Row = TypeVar("Row", JobRow, RunRow, AttemptRow, WorkerRow)

_OF_RUN = sa.select(runs, jobs.c.name, jobs.c.outputs).join(jobs, jobs.c.id == runs.c.job)
_LATEST = sa.select(sa.func.max(runs.c.id)).where(runs.c.job == jobs.c.id).correlate(jobs).scalar_subquery()
_OF_JOB = (
    sa.select(
        jobs,
        runs.c.id.label("run"),
        runs.c.state,
        runs.c.error,
        sa.func.coalesce(runs.c.ended, runs.c.started, runs.c.queued).label("updated"),
    )
    .join(runs, runs.c.job == jobs.c.id)
    .where(runs.c.id == _LATEST)
)


class Reader:
    """A store, opened for reading. `clock` gives seconds since 1970."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Raises BadInput where the file cannot be opened, is no store, or has a later schema."""
        self.path, self.clock = path, clock
        self.engine = open_database(path)
        self._readonly = self.engine.execution_options(readonly=True)

    def close(self) -> None:
        """Let go of the file."""
        self.engine.dispose()

    def jobs(self, state: State | None = None, limit: int | None = 1000) -> list[JobRow]:
        """Jobs, the one that something happened to last first; with `state`, those whose latest run is in it."""
        query = _OF_JOB.where(runs.c.state == state) if state else _OF_JOB
        return self._all(JobRow, query.order_by(runs.c.id.desc()).limit(limit))

    def job(self, number: int) -> JobRow:
        """One job. Raises BadInput where there is none of that number."""
        return self._one(JobRow, _OF_JOB.where(jobs.c.id == number), f"job {number}")

    def runs(
        self,
        job: int | None = None,
        states: Sequence[State] = (),
        since: float = 0.0,
        limit: int | None = 1000,
        queue: str | None = None,
    ) -> list[RunRow]:
        """Runs, the newest first: of a job, in some states, queued at or after `since`, of a queue."""
        query = _OF_RUN.where(runs.c.queued >= since)
        if queue is not None:
            query = query.where(runs.c.queue == queue)
        if job is not None:
            query = query.where(runs.c.job == job)
        if states:
            query = query.where(runs.c.state.in_(states))
        return self._all(RunRow, query.order_by(runs.c.id.desc()).limit(limit))

    def run(self, number: int) -> RunRow:
        """One run. Raises BadInput where there is none of that number."""
        return self._one(RunRow, _OF_RUN.where(runs.c.id == number), f"run {number}")

    def queue(self, name: str) -> list[RunRow]:
        """The runs of a queue that wait to be done, the oldest first."""
        query = _OF_RUN.where(runs.c.queue == name, runs.c.state.in_(("queued", "waiting")))
        return self._all(RunRow, query.order_by(runs.c.id))

    def attempts(self, run: int) -> list[AttemptRow]:
        """The attempts of a run, the first first."""
        return self._all(AttemptRow, sa.select(attempts).where(attempts.c.run == run).order_by(attempts.c.number))

    def counts_by_state(self) -> dict[State, int]:
        """How many runs are in each state, those of none included."""
        with self._reading() as connection:
            found = connection.execute(sa.select(runs.c.state, sa.func.count()).group_by(runs.c.state))
            counts: dict[str, int] = dict(found.all())
        return {state: counts.get(state, 0) for state in STATES}

    def recent_failures(self, count: int) -> list[RunRow]:
        """The runs that ended badly last: refused, failed, crashed or interrupted."""
        return self._all(RunRow, _OF_RUN.where(runs.c.state.in_(BAD)).order_by(runs.c.ended.desc(), runs.c.id.desc()).limit(count))

    def workers(self) -> list[WorkerRow]:
        """Batches and daemons, the newest first."""
        return self._all(WorkerRow, sa.select(workers).order_by(workers.c.started.desc()))

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._readonly.connect() as connection:
            yield connection

    def _all(self, kind: type[Row], query: sa.Select[Any]) -> list[Row]:
        with self._reading() as connection:
            return [_row(kind, found) for found in connection.execute(query).mappings()]

    def _one(self, kind: type[Row], query: sa.Select[Any], what: str) -> Row:
        found = self._all(kind, query)
        if not found:
            raise BadInput([Problem(what, f"nothing of that number in {self.path}", "one that `headrace jobs` lists")])
        return found[0]


def _row(kind: type[Row], found: sa.RowMapping) -> Row:
    make: Any = kind
    made: Row = make(**{field.name: _frozen(found[field.name]) for field in fields(kind)})
    return made


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
