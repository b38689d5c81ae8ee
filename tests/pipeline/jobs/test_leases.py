"""Leases and the states of runs: laws that hold whatever happens in whatever order, and with several processes at once."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.errors import BadInput
from pipeline.jobs import tables
from pipeline.jobs.leases import LEASE_SECONDS
from pipeline.jobs.rows import ACTIVE, BAD, BEFORE, GOOD, AttemptRow, RunRow, State
from pipeline.jobs.store import SERVE, JobStore
from tests.pipeline.jobs.stores import Clock, conversion, fresh
from tests.support.examples import examples

# Each job with the resources that it writes: most share some.
JOBS = (("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "c"), ("d",))
ENDS: tuple[State, ...] = ("done", "up_to_date", "refused", "failed", "crashed", "cancelled", "interrupted", "split")
# Picks one of what there is, however much that is.
ANY = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """A store with several workers, any of which may be killed, or sleep, at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.store = fresh(Path(self.directory.name), self.clock)
        self.workers: list[str] = []
        self.dead: set[str] = set()
        self.states: dict[int, State] = {}
        self.tokens: dict[str, int] = {}
        self.over: dict[int, tuple[str | None, float | None]] = {}

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()

    def is_alive(self, _pid: int, birth: str) -> bool:
        return birth not in self.dead

    @initialize(jobs=st.lists(st.tuples(st.integers(0, len(JOBS) - 1), st.booleans()), min_size=2, max_size=5))
    def begin(self, jobs: list[tuple[int, bool]]) -> None:
        for _ in range(2):
            self.begin_worker()
        for job, daemon in jobs:
            self.enqueue(job, daemon)

    def begin_worker(self) -> None:
        worker = self.store.register("serve").id
        with self.store.engine.begin() as connection:  # all are this process: their births tell them apart
            connection.execute(tables.workers.update().where(tables.workers.c.id == worker).values(birth=worker))
        self.workers.append(worker)

    def of(self, number: int, state: State | None = None) -> RunRow | None:
        """One of the runs, those in a state, where there is one."""
        runs = self.store.runs(limit=None, states=(state,) if state else ())
        return runs[number % len(runs)] if runs else None

    def attempt(self, number: int) -> AttemptRow | None:
        """One of the attempts; the latest ones more often."""
        found = [each for run in self.store.runs(limit=None) for each in self.store.attempts(run.id)]
        return sorted(found, key=lambda each: -each.id)[number % min(len(found), 4)] if found else None

    @rule(job=st.integers(0, len(JOBS) - 1), daemon=st.booleans())
    def enqueue(self, job: int, daemon: bool) -> None:
        run, made = self.store.enqueue(conversion(str(job), *JOBS[job]), SERVE if daemon else "batch", "test")
        assert made or run.state in ACTIVE

    @rule(number=ANY, worker=ANY, state=st.sampled_from(["queued", "queued", "waiting", None]))
    def claim(self, number: int, worker: int, state: State | None) -> None:
        before = self.of(number, state)
        if before is None:
            return
        held = {resource for attempt in self.open() for resource in self.store.run(attempt.run).resources}
        got = self.store.claim(before.id, self.workers[worker % len(self.workers)])
        free = before.state in BEFORE["running"] and before.not_before <= self.clock.now and not held & set(before.resources)
        assert isinstance(got, AttemptRow) == free
        if isinstance(got, AttemptRow):
            assert got.number == before.attempts + 1
        else:
            assert got <= {attempt.id for attempt in self.open()}

    @rule(number=ANY, state=st.sampled_from([*ENDS, "waiting", "queued"]), delay=st.sampled_from([0.0, 10.0, 100.0]))
    def finish(self, number: int, state: State, delay: float) -> None:
        attempt = self.attempt(number)
        if attempt:
            outcome = state if state in ENDS else "failed"
            kept = self.store.finish(attempt.id, state, not_before=self.clock.now + delay, outcome=outcome, exit_code=0)
            assert kept == (attempt.outcome is None), "an attempt ends once, and a lost one has ended"

    @rule(worker=ANY)
    def beat(self, worker: int) -> None:
        name = self.workers[worker % len(self.workers)]
        mine = [each.id for each in self.open() if each.worker == name]
        assert self.store.heartbeat(name, dict.fromkeys(mine, (1, 2))) == frozenset()

    @rule(number=ANY)
    def beat_for_what_is_over(self, number: int) -> None:
        attempt = self.attempt(number)
        if attempt and attempt.outcome:
            assert self.store.heartbeat(attempt.worker, {attempt.id: (1, 2)}) == {attempt.id}
            assert not self.store.began(attempt.id, 1)

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS / 2, LEASE_SECONDS + 1]))
    def sleep(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(worker=ANY)
    def kill_worker(self, worker: int) -> None:
        self.dead.add(self.workers.pop(worker % len(self.workers)))
        self.begin_worker()

    @rule(number=ANY, wanted=st.booleans())
    def take_over(self, number: int, wanted: bool) -> None:
        attempt = self.attempt(number)
        if attempt:
            stale = {each.id for each in self.store.stale({attempt.id} if wanted else (), self.is_alive)}
            gone = {each.id for each in self.open() if each.worker in self.dead}
            assert gone <= stale <= gone | {attempt.id}
            assert self.store.lose(attempt, self.is_alive) or attempt.id not in stale

    @rule()
    def bury(self) -> None:
        assert {row.id for row in self.store.bury(self.is_alive)} <= self.dead

    @rule(number=ANY)
    def cancel(self, number: int) -> None:
        run = self.of(number)
        assert run
        latest = self.store.run(self.store.job(run.job).run)
        try:
            after = self.store.cancel(run.job)
        except BadInput:
            assert latest.state not in ACTIVE
        else:
            assert after.state == ("running" if latest.state == "running" else "cancelled")

    @rule(number=ANY)
    def retry(self, number: int) -> None:
        run = self.of(number)
        assert run
        try:
            assert self.store.retry(run.job).state in ACTIVE
        except BadInput:
            assert self.store.job(run.job).state in ACTIVE

    def open(self) -> list[AttemptRow]:
        return [each for run in self.store.runs(limit=None) for each in self.store.attempts(run.id) if each.outcome is None]

    @invariant()
    def nothing_is_written_by_two(self) -> None:
        held = [resource for each in self.open() for resource in self.store.run(each.run).resources]
        assert len(held) == len(set(held))

    @invariant()
    def leases_are_those_of_attempts_under_way(self) -> None:
        with self.store.engine.connect() as connection:
            rows = connection.execute(sa.select(tables.leases)).all()
        wanted = {(resource, each.id) for each in self.open() for resource in self.store.run(each.run).resources}
        assert {(row.resource, row.attempt) for row in rows if row.attempt is not None} == wanted
        for row in rows:
            assert row.token >= self.tokens.get(row.resource, 1)
            self.tokens[row.resource] = row.token

    @invariant()
    def runs_go_their_ways(self) -> None:
        under_way = [each.run for each in self.open()]
        for run in self.store.runs(limit=None):
            before = self.states.get(run.id)
            assert before in (None, run.state) or before in BEFORE.get(run.state, ()), (before, run.state)
            self.states[run.id] = run.state
            assert under_way.count(run.id) == int(run.state == "running")
            assert (run.ended is not None) == (run.state not in ACTIVE)
            assert run.attempts == len(self.store.attempts(run.id))

    @invariant()
    def what_is_over_does_not_change(self) -> None:
        for run in self.store.runs(limit=None):
            for each in self.store.attempts(run.id):
                if each.outcome is not None:
                    assert self.over.setdefault(each.id, (each.outcome, each.ended)) == (each.outcome, each.ended)

    @invariant()
    def the_counts_are_those_of_the_runs(self) -> None:
        counts = self.store.counts_by_state()
        assert sum(counts.values()) == len(self.store.runs(limit=None))
        assert sum(counts[state] for state in BAD) == len(self.store.recent_failures(10_000))
        assert not set(GOOD) & set(BAD)


TestLaws = Machine.TestCase
# What fails is not made smaller: that would take minutes.
TestLaws.settings = examples(10, stateful_step_count=30, phases=(Phase.explicit, Phase.generate))


def test_a_lease_is_not_taken_from_one_who_is_late_but_alive_unless_it_is_wanted(tmp_path: Path) -> None:
    clock = Clock()
    store = fresh(tmp_path, clock)
    run, _ = store.enqueue(conversion(), SERVE, "test")
    attempt = store.claim(run.id, store.register("serve").id)
    assert isinstance(attempt, AttemptRow)
    assert store.stale() == []
    clock.now += LEASE_SECONDS + 1
    assert store.stale() == []
    assert store.stale({attempt.id}) == [attempt]
    # It came back before anyone took it.
    assert store.heartbeat(attempt.worker, {attempt.id: (0, 0)}) == frozenset()
    assert not store.lose(attempt)
    clock.now += LEASE_SECONDS + 1
    assert store.lose(attempt)
    assert store.heartbeat(attempt.worker, {attempt.id: (0, 0)}) == {attempt.id}
    assert store.run(run.id).state == "queued"


def test_a_process_that_began_in_the_meantime_is_not_taken_for_gone(tmp_path: Path) -> None:
    clock = Clock()
    store = fresh(tmp_path, clock)
    run, _ = store.enqueue(conversion(), SERVE, "test")
    before = store.claim(run.id, store.register("serve").id)
    assert isinstance(before, AttemptRow)
    clock.now += LEASE_SECONDS + 1
    # Somebody looks, sees no process, and is about to take it; now it begins, which renews the lease.
    assert store.stale({before.id}) == [before]
    assert store.began(before.id, os.getpid())
    assert not store.lose(before)
    clock.now += LEASE_SECONDS + 1
    assert not store.lose(before), "what was known to be gone is not what runs"
    (now,) = store.stale({before.id})
    assert now.pid == os.getpid()
    assert store.lose(now)


def test_what_a_dead_batch_was_at_is_interrupted_and_what_a_dead_daemon_was_at_waits_again(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    states = {}
    for kind in ("batch", "serve"):
        worker = store.register(kind).id  # type: ignore[arg-type]
        queue = SERVE if kind == "serve" else worker
        begun, _ = store.enqueue(conversion(f"{kind} begun"), queue, "test")
        waits, _ = store.enqueue(conversion(f"{kind} waits"), queue, "test")
        attempt = store.claim(begun.id, worker)
        assert isinstance(attempt, AttemptRow)
        assert store.lose(attempt, lambda *_: False)
        assert [row.id for row in store.bury(lambda *_: False)] == [worker]
        states[kind] = store.run(begun.id).state, store.run(waits.id).state
        assert store.attempts(begun.id)[0].outcome == "lost"
    assert states == {"batch": ("interrupted", "interrupted"), "serve": ("queued", "queued")}


# Each process claims what it can, is alone with it for a moment, and gives it back; some are killed while they have it.
CONTENDER = """
import os, random, sys, time
from pathlib import Path
from pipeline.jobs import process
from pipeline.jobs.rows import AttemptRow
from pipeline.jobs.store import SERVE, open_store
from tests.pipeline.jobs.stores import conversion
directory, number = Path(sys.argv[1]), int(sys.argv[2])
store = open_store(directory / "jobs.db")
worker, done = store.register("serve").id, 0
random.seed(number)
print("ready", flush=True)
while done < 12:
    name = random.choice("ab")
    run, _ = store.enqueue(conversion(name, f"/ranks/{name}", by=number), SERVE, "test")
    got = store.claim(run.id, worker)
    if not isinstance(got, AttemptRow):
        for attempt in store.stale(got):
            if process.kill(attempt.pid, attempt.birth):
                store.lose(attempt)
        continue
    if not store.began(got.id, os.getpid()):
        continue
    inside = directory / f"inside-{name}"
    try:
        with inside.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        # Only what a killed process left may be there.
        if process.birth(int(inside.read_text() or "0")):
            (directory / "overlap").write_text(f"{os.getpid()} {inside.read_text()}")
        inside.write_text(str(os.getpid()))
    time.sleep(0.005)
    inside.unlink()
    assert store.finish(got.id, "done", outcome="done", exit_code=0)
    done += 1
"""


def test_processes_exclude_one_another_also_when_some_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(4)]
    for each in processes:  # all have opened, and one made, a database that was not there
        assert each.stdout
        assert each.stdout.readline() == "ready\n"
    for victim in processes[:2]:
        time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
    codes = [each.wait(timeout=60) for each in processes]
    for each in processes:
        assert each.stdout
        each.stdout.close()
    assert set(codes[2:]) == {0}
    assert not (tmp_path / "overlap").exists()
    store = JobStore(tmp_path / "jobs.db", time.time)
    ended = [attempt for run in store.runs(limit=None) for attempt in store.attempts(run.id)]
    for resource in ("/ranks/a", "/ranks/b"):
        mine = sorted((each.started, each.ended or 0) for each in ended if store.run(each.run).resources == (resource,))
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(mine)), "one after another"
    assert sum(each.outcome == "done" for each in ended) >= 24
