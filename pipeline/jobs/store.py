"""The store of jobs, runs and attempts, and the changes of state they may go through. Each method is one transaction.

A run goes from state to state by rows.BEFORE and no other way. An attempt is begun by `claim`, which gives it leases of everything
that it writes, and ended once, by `finish` or by `lose`. What lies between is in `heartbeat`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from pipeline.errors import BadInput, Problem
from pipeline.jobs import leases, process
from pipeline.jobs.reading import Reader
from pipeline.jobs.rows import ACTIVE, BEFORE, GOOD, AttemptRow, Conversion, RunRow, State, WorkerRow
from pipeline.jobs.tables import arrivals, attempts, jobs, runs, triggers, workers

SERVE = "serve"  # the daemon's queue; a batch has one of its own, by its worker's id
IS_ALIVE = process.alive


def default_path() -> Path:
    """Where the store is unless --store says otherwise: by the XDG Base Directory Specification."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if Path(state).is_absolute() else Path.home() / ".local/state") / "headrace/jobs.db"


def open_store(path: Path | None = None, clock: Callable[[], float] = time.time) -> JobStore:
    """Open a store, creating it where it is not there. Raises BadInput where it cannot be used."""
    return JobStore((path or default_path()).absolute(), clock)


class JobStore(Reader):
    """A store that is read and written. Safe from any thread and with any number of processes beside."""

    def register(self, kind: Literal["batch", "serve"]) -> WorkerRow:
        """Make this process known as a worker."""
        pid = os.getpid()
        with self._writing() as (connection, now):
            made = WorkerRow(uuid.uuid4().hex, kind, pid, process.birth(pid), now, now, None)
            connection.execute(workers.insert().values(vars(made)))
        return made

    def end_worker(self, worker: str) -> None:
        """Say that a worker has ended in order."""
        with self._writing() as (connection, now):
            connection.execute(workers.update().where(workers.c.id == worker).values(ended=now))

    def enqueue(
        self, wanted: Conversion, queue: str, cause: str, state: State = "queued", exit_code: int | None = None, error: str = ""
    ) -> tuple[RunRow, bool]:
        """Have a conversion done, and whether that made a run: one that waits or runs in the queue already stands for both.

        `state`: another than queued for what ended before it began, as a refused request, with its `exit_code` and `error`.
        """
        with self._writing() as (connection, now):
            job = _job(connection, wanted, now)
            active = sa.select(runs.c.id).where(runs.c.job == job, runs.c.queue == queue, runs.c.state.in_(ACTIVE))
            found = connection.execute(active).scalar_one_or_none() if state == "queued" else None
            ended = {} if state == "queued" else {"ended": now, "exit_code": exit_code, "error": error}
            planned = {name: getattr(wanted, name) for name in ("resources", "room", "peak_memory_bytes", "scratch", "parts")}
            values = {"job": job, "state": state, "cause": cause, "queue": queue, "queued": now, **planned, **ended}
            insert = runs.insert().values(values).returning(runs.c.id)
            number = found or connection.execute(insert).scalar_one()
        return self.run(number), found is None

    def latest(self, wanted: Conversion) -> RunRow | None:
        """The latest run of the job that a conversion is of, where there was one."""
        with self._reading() as connection:
            query = sa.select(sa.func.max(runs.c.id)).join(jobs, jobs.c.id == runs.c.job).where(jobs.c.key == _key(wanted))
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else self.run(found)

    def retry(self, job: int) -> RunRow:
        """Have the daemon do a job again. Raises BadInput where it waits or runs already."""
        latest = self._latest(job)
        if latest.state in ACTIVE:
            raise BadInput([Problem(f"job {job}", f"it is {latest.state}", "a job that has ended")])
        row = self.job(job)
        if not row.outputs:
            raise BadInput([Problem(f"job {job}", "a request that never became one", "a job", f"Mend {row.source} and ask again")])
        return self.enqueue(self.conversion(latest), SERVE, "retry")[0]

    def conversion(self, run: RunRow) -> Conversion:
        """The conversion that a run is for."""
        row = self.job(run.job)
        planned = (run.resources, run.room, run.peak_memory_bytes, run.scratch, run.parts)
        return Conversion(row.name, row.source, row.outputs, row.options, *planned)

    def cancel(self, job: int) -> RunRow:
        """Cancel what waits at once, and have what runs stopped by its worker. Raises BadInput where nothing does."""
        latest = self._latest(job)
        with self._writing() as (connection, now):
            if not _move(connection, latest.id, "cancelled", ("queued", "waiting"), ended=now, error="cancelled"):
                running = (runs.c.id == latest.id) & (runs.c.state == "running")
                asked = connection.execute(runs.update().where(running).values(cancel_requested=True)).rowcount
                if not asked:
                    raise BadInput([Problem(f"job {job}", f"it ended: {latest.state}", "a job that waits or runs")])
        return self.run(latest.id)

    def claim(self, run: int, worker: str) -> AttemptRow | frozenset[int]:
        """Begin an attempt of a run that waits, with the leases of all that it writes.

        Returns the attempt; or, where others hold what it writes, their attempts; none where the run is no longer to be done.
        """
        with self._writing() as (connection, now):
            ready = (runs.c.id == run) & runs.c.state.in_(BEFORE["running"]) & (runs.c.not_before <= now)
            row = connection.execute(sa.select(runs.c.resources, runs.c.attempts).where(ready)).one_or_none()
            if row is None:
                return frozenset()
            held = leases.holders(connection, row.resources)
            if held:
                return frozenset(held)
            values = {"run": run, "number": row.attempts + 1, "worker": worker, "started": now}
            attempt = connection.execute(attempts.insert().values(values).returning(attempts.c.id)).scalar_one()
            leases.acquire(connection, attempt, row.resources, now)
            started = sa.func.coalesce(runs.c.started, now)
            _move(connection, run, "running", BEFORE["running"], attempts=row.attempts + 1, started=started)
        return next(each for each in self.attempts(run) if each.id == attempt)

    def began(self, attempt: int, pid: int) -> bool:
        """Record an attempt's process, and renew its leases; False where it has been lost: then the process must not go on."""
        with self._writing() as (connection, now):
            leases.renew(connection, [attempt], now)
            return _change(connection, attempt, pid=pid, birth=process.birth(pid))

    def heartbeat(self, worker: str, progress: Mapping[int, tuple[int, int]]) -> frozenset[int]:
        """Renew the leases of a worker's attempts and record how far they are: (bytes done, in all) by attempt.

        Returns those that have been lost: their processes must be stopped.
        """
        with self._writing() as (connection, now):
            connection.execute(workers.update().where(workers.c.id == worker).values(heartbeat=now))
            still = sa.select(attempts.c.id, attempts.c.run).where(attempts.c.id.in_(progress), attempts.c.outcome.is_(None))
            kept = {found.id: found.run for found in connection.execute(still)}
            leases.renew(connection, list(kept), now)
            for attempt, run in kept.items():
                done, total = progress[attempt]
                connection.execute(runs.update().where(runs.c.id == run).values(bytes_done=done, bytes_total=total))
        return frozenset(set(progress) - set(kept))

    def cancellations(self, worker: str) -> frozenset[int]:
        """The attempts of a worker that somebody wants to have cancelled."""
        query = sa.select(attempts.c.id).join(runs, runs.c.id == attempts.c.run)
        mine = (attempts.c.worker == worker) & attempts.c.outcome.is_(None) & runs.c.cancel_requested
        with self._reading() as connection:
            return frozenset(connection.execute(query.where(mine)).scalars())

    def finish(
        self,
        attempt: int,
        state: State,
        progress: tuple[int, int] = (0, 0),
        *,
        not_before: float = 0.0,
        failures: int = 0,
        **found: Any,
    ) -> bool:
        """End an attempt: its run is now in `state`, and its leases are free. What was to go on and was cancelled does not.

        `progress`: bytes written, and in all. `found`: columns of the attempt (outcome, exit_code, error, seconds, bytes_read and
        the others). `not_before`: when a run that waits may be tried again. `failures`: how many more count against it. Returns
        False where the attempt had been lost.
        """
        with self._writing() as (connection, now):
            if not _change(connection, attempt, ended=now, **found):
                return False
            query = sa.select(runs).join(attempts, attempts.c.run == runs.c.id).where(attempts.c.id == attempt)
            run = connection.execute(query).one()
            state = "cancelled" if state in ACTIVE and run.cancel_requested else state
            values: dict[str, Any] = {"exit_code": found.get("exit_code"), "error": found.get("error", "")}
            values |= {"not_before": not_before, "failures": runs.c.failures + failures}
            values |= {"bytes_done": progress[0], "bytes_total": progress[1]}
            if state in GOOD:  # a conversion removes its own cuts
                values["scratch"] = [place for place in run.scratch if place in run.resources]
            _move(connection, run.id, state, BEFORE[state], **values, **({} if state in ACTIVE else {"ended": now}))
            leases.release(connection, attempt)
        return True

    def stale(self, wanted: Collection[int] = (), is_alive: Callable[[int, str], bool] = IS_ALIVE) -> list[AttemptRow]:
        """Attempts whose worker is gone, and those of `wanted` whose worker has not renewed their leases in time.

        A worker may be late with the whole machine, after a sleep: it is not disturbed unless somebody wants what it holds.
        """
        with self._reading() as connection:
            late = leases.expired(connection, self.clock()) & set(wanted)
            query = sa.select(attempts.c.id, workers.c.pid, workers.c.birth, workers.c.ended)
            query = query.join(workers, workers.c.id == attempts.c.worker).where(attempts.c.outcome.is_(None))
            found = connection.execute(query).all()
        gone = {row.id for row in found if row.id in late or row.ended is not None or not is_alive(row.pid, row.birth)}
        return self._all(AttemptRow, sa.select(attempts).where(attempts.c.id.in_(gone)).order_by(attempts.c.id))

    def lose(self, attempt: AttemptRow, is_alive: Callable[[int, str], bool] = IS_ALIVE) -> bool:
        """End an attempt whose worker is gone or late, once its process is known to be gone: its run can be done again.

        The daemon's runs wait again; those of a batch that is gone are interrupted. Returns False where it is not to be ended, any
        more: the worker has come back, or it has another process by now than `attempt` says.
        """
        error = "the process that was in charge of it is gone"
        with self._writing() as (connection, now):
            query = sa.select(attempts.c.pid.label("child"), workers).join(workers).where(attempts.c.id == attempt.id)
            row = connection.execute(query).one()
            late = attempt.id in leases.expired(connection, now) or row.ended is not None or not is_alive(row.pid, row.birth)
            if not late or row.child != attempt.pid:
                return False
            if not _change(connection, attempt.id, ended=now, outcome="lost", error=error):
                return False
            run = connection.execute(sa.select(runs.c.queue, runs.c.cancel_requested).where(runs.c.id == attempt.run)).one()
            state: State = "cancelled" if run.cancel_requested else "queued" if run.queue == SERVE else "interrupted"
            values = {} if state == "queued" else {"ended": now, "error": error, "exit_code": 3}
            _move(connection, attempt.run, state, BEFORE[state], **values)
            leases.release(connection, attempt.id)
        return True

    def bury(self, is_alive: Callable[[int, str], bool] = IS_ALIVE) -> list[WorkerRow]:
        """Record that workers whose processes are gone have ended, and interrupt the runs that waited in their batches' queues.

        Returns these workers.
        """
        gone = [row for row in self.workers() if row.ended is None and not is_alive(row.pid, row.birth)]
        error = "the batch that it belonged to is gone"
        with self._writing() as (connection, now):
            for row in gone:
                connection.execute(workers.update().where(workers.c.id == row.id).values(ended=now))
            waiting = sa.select(runs.c.id).where(
                runs.c.queue.in_([row.id for row in gone]), runs.c.state.in_(("queued", "waiting"))
            )
            for run in connection.execute(waiting).scalars().all():
                _move(connection, run, "interrupted", BEFORE["interrupted"], ended=now, error=error, exit_code=3)
        return gone

    def interrupt(self, queue: str, error: str) -> None:
        """End what waits in a queue, as the batch that it is of was stopped."""
        with self._writing() as (connection, now):
            waiting = (runs.c.queue == queue) & runs.c.state.in_(("queued", "waiting"))
            values = {"state": "interrupted", "ended": now, "error": error, "exit_code": 3}
            connection.execute(runs.update().where(waiting).values(values))

    def fired(self, trigger: str) -> float | None:
        """When a trigger fired last."""
        with self._reading() as connection:
            return connection.execute(sa.select(triggers.c.fired).where(triggers.c.name == trigger)).scalar_one_or_none()

    def set_fired(self, trigger: str, when: float) -> None:
        """Record when a trigger fired."""
        self._put(triggers, {"name": trigger}, {"fired": when})

    def arrival(self, watch: str, place: str) -> str | None:
        """The fingerprint of the checkpoint that a watch found at a place last."""
        query = sa.select(arrivals.c.fingerprint).where(arrivals.c.watch == watch, arrivals.c.place == place)
        with self._reading() as connection:
            return connection.execute(query).scalar_one_or_none()

    def set_arrival(self, watch: str, place: str, fingerprint: str) -> None:
        """Record what a watch has found."""
        self._put(arrivals, {"watch": watch, "place": place}, {"fingerprint": fingerprint, "found": self.clock()})

    def forget(self, before: float) -> int:
        """Remove the runs that ended before a time and left no scratch, and jobs that have none left; returns how many runs."""
        with self.engine.begin() as connection:
            clean = sa.cast(runs.c.scratch, sa.String) == "[]"
            gone = connection.execute(runs.delete().where(runs.c.ended < before, clean)).rowcount
            connection.execute(jobs.delete().where(jobs.c.id.not_in(sa.select(runs.c.job))))
            used = sa.select(attempts.c.worker)
            connection.execute(workers.delete().where(workers.c.ended < before, workers.c.id.not_in(used)))
        return gone

    def drop_scratch(self, place: str) -> None:
        """Record that a cut is no longer there."""
        with self.engine.begin() as connection:
            for row in connection.execute(sa.select(runs.c.id, runs.c.scratch)).all():
                if place in row.scratch:
                    left = [each for each in row.scratch if each != place]
                    connection.execute(runs.update().where(runs.c.id == row.id).values(scratch=left))

    @contextmanager
    def _writing(self) -> Iterator[tuple[sa.Connection, float]]:
        """A transaction, and the time: as it is once the lock is there, so that what comes later also has a later time."""
        with self.engine.begin() as connection:
            yield connection, self.clock()

    def _latest(self, job: int) -> RunRow:
        return self.run(self.job(job).run)

    def _put(self, table: sa.Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        same = sa.and_(*(table.c[name] == value for name, value in key.items()))
        with self.engine.begin() as connection:
            if not connection.execute(table.update().where(same).values(values)).rowcount:
                connection.execute(table.insert().values({**key, **values}))


def _job(connection: sa.Connection, wanted: Conversion, now: float) -> int:
    """The number of a job by its options, made where it is not there."""
    key = _key(wanted)
    values: dict[str, Any] = {"name": wanted.name, "source": wanted.source, "outputs": list(wanted.outputs)}
    found = connection.execute(jobs.update().where(jobs.c.key == key).values(values).returning(jobs.c.id)).scalar_one_or_none()
    values |= {"key": key, "options": dict(wanted.options), "created": now}
    return int(found or connection.execute(jobs.insert().values(values).returning(jobs.c.id)).scalar_one())


def _key(wanted: Conversion) -> str:
    """The key of a job: a hash of its options, which tell it from all others."""
    return hashlib.sha256(json.dumps(wanted.options, sort_keys=True).encode()).hexdigest()


def _move(connection: sa.Connection, run: int, state: State, before: Collection[State], **values: Any) -> bool:
    """Have a run go from one of the states before to another; False where it is in none of them."""
    here = (runs.c.id == run) & runs.c.state.in_(before)
    return connection.execute(runs.update().where(here).values(state=state, **values)).rowcount == 1


def _change(connection: sa.Connection, attempt: int, **values: Any) -> bool:
    """Change an attempt that is under way; False where it has ended."""
    here = (attempts.c.id == attempt) & attempts.c.outcome.is_(None)
    return connection.execute(attempts.update().where(here).values(values)).rowcount == 1
