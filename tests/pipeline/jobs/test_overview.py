"""All jobs at one moment: counters that only grow, gauges of what is at work."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.jobs import overview
from pipeline.jobs.events import Stalled
from pipeline.jobs.overview import Overseer
from pipeline.jobs.overview_page import failures_table, header, jobs_table, rank_rows
from pipeline.watching.metrics import BUCKETS, Durations, Metrics, Reading
from tests.pipeline.jobs.told import Told


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def overseer(told: Told, clock: Clock) -> Overseer:
    made = Overseer(told.store, clock)
    told.hub.subscribe(made)
    return made


def samples(reading: Reading) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = Metrics(lambda: reading).text().decode()
    found = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(dict(found)) == len(found), "a series twice: Prometheus would refuse all"
    return dict(found)


def test_a_job_from_the_queue_to_its_end(told: Told, overseer: Overseer, clock: Clock) -> None:
    run = told.queue("llama")
    now = overseer.look()
    assert (now.reading.queue_length, now.reading.states["queued"], now.live) == (1, 1, {})
    attempt = told.start(run)
    clock.now += 3
    assert overseer.look().reading.running[0].idle_seconds == 3
    told.progress(run, 400, memory_bytes=7, memory_limit_bytes=9, tasks=5, done_tasks=2, ranks=(("llama", 0, 100, 300),))
    found = samples(overseer.look().reading)
    job = ("job", f"{run.job} llama")
    assert found["headrace_jobs", (("state", "running"),)] == 1
    assert found["headrace_job_bytes", (job,)] == 400
    assert found["headrace_job_size_bytes", (job,)] == 1000
    assert found["headrace_job_eta_seconds", (job,)] == 60
    assert found["headrace_job_memory_bytes", (job,)] == 7
    assert found["headrace_job_memory_limit_bytes", (job,)] == 9
    assert found["headrace_job_done_tasks", (job,)] == 2
    assert found["headrace_rank_bytes", (job, ("rank", "0"), ("target", "llama"))] == 100
    assert found["headrace_stage_bytes_total", (("stage", "write"),)] == 400
    told.finish(run, attempt)
    found = samples(overseer.look().reading)
    assert ("headrace_job_bytes", (job,)) not in found
    assert found["headrace_stage_bytes_total", (("stage", "write"),)] == 1000
    assert found["headrace_jobs", (("state", "done"),)] == 1
    assert found["headrace_job_duration_seconds_count", (("outcome", "done"),)] == 1
    assert found["headrace_job_duration_seconds_sum", (("outcome", "done"),)] == 7
    assert found["headrace_job_duration_seconds_bucket", (("le", "5.0"), ("outcome", "done"))] == 0
    assert found["headrace_job_duration_seconds_bucket", (("le", "15.0"), ("outcome", "done"))] == 1
    assert found["headrace_job_duration_seconds_bucket", (("le", "+Inf"), ("outcome", "done"))] == 1


def test_counters_only_grow(told: Told, overseer: Overseer) -> None:
    seen = [0.0]

    def note() -> None:
        seen.append(overseer.look().reading.stages.get("write", {}).get("bytes", 0.0))

    for outcome, written in (("failed", 300), ("done", 1000)):
        run = told.queue("llama")
        attempt = told.start(run)
        note()
        for done in (100, 300):
            told.progress(run, done)
            note()
        told.finish(run, attempt, outcome, written=written)
        note()
    assert seen == sorted(seen)
    assert seen[-1] == 1300


def test_jobs_of_one_name_are_told_apart(told: Told, overseer: Overseer) -> None:
    first, second = told.queue("a/llama"), told.queue("b/llama")
    for run in (first, second):
        told.start(run)
        told.progress(run, 10, ranks=(("llama", 0, 1, 2),))
    # The label of a job is its number and its name: a directory may have the same name elsewhere.
    assert len({job.name for job in overseer.look().reading.running}) == 2
    samples(overseer.look().reading)


def test_stalls_are_counted(told: Told, overseer: Overseer) -> None:
    run = told.queue("llama")
    told.start(run)
    told.hub.publish(Stalled(*told.of(run), attempt=1, seconds=600, bytes=1, total_bytes=2))
    assert overseer.look().reading.stalls == 1


def test_what_does_not_move_grows_idle(told: Told, overseer: Overseer, clock: Clock) -> None:
    run = told.queue("llama")
    told.start(run)
    told.progress(run, 10)
    clock.now += 20
    told.progress(run, 10)
    assert overseer.look().reading.running[0].idle_seconds == 20
    told.progress(run, 11)
    assert overseer.look().reading.running[0].idle_seconds == 0


def test_what_another_process_took_over_is_forgotten_but_its_bytes(told: Told, overseer: Overseer, clock: Clock) -> None:
    run = told.queue("llama")
    attempt = told.start(run)
    told.progress(run, 10)
    told.store.finish(attempt.id, "failed", outcome="failed")  # and nobody says so here
    assert run.id in overseer.look().live
    clock.now += overview.FORGET_SECONDS + 1
    assert overseer.look().live == {}
    assert overseer.look().reading.stages["write"]["bytes"] == 10


def test_samples_are_few(told: Told, overseer: Overseer, clock: Clock) -> None:
    run = told.queue("llama")
    told.start(run)
    for done in range(3 * overview.MAX_SAMPLES):
        clock.now += overview.SAMPLE_SECONDS
        told.progress(run, done, total=10**6, memory_bytes=5)
    now = overseer.look()
    assert overview.MAX_SAMPLES / 2 <= len(now.samples) <= overview.MAX_SAMPLES
    assert now.samples[-1].memory_bytes == 5
    assert now.samples[-1].done_bytes == 3 * overview.MAX_SAMPLES - 1


def test_durations_fall_into_buckets() -> None:
    took = Durations()
    for seconds in (0.5, 1.0, 100.0, 10.0**6):
        took = took.plus(seconds)
    assert took.total == 4
    assert took.seconds == 0.5 + 1.0 + 100.0 + 10.0**6
    assert dict(zip(BUCKETS, took.counts, strict=True)) == {bound: 2 if bound < 300 else 3 for bound in BUCKETS}


def test_the_page_says_it_in_words_and_escapes_them(told: Told, overseer: Overseer) -> None:
    bad = told.queue("<b>bad</b>")
    told.finish(bad, told.start(bad), "refused", error="<script>alert(1)</script> found")
    run = told.queue("llama")
    told.start(run)
    told.progress(run, 500, memory_bytes=1 << 20, memory_limit_bytes=2 << 30, ranks=(("x", 0, 1, 4), ("y", 0, 2, 4)))
    now = overseer.look()
    text = header(now) + jobs_table(now) + failures_table(now.failures)
    for word in (
        "llama",
        "running",
        "500 B of 1000 B",
        "10 B/s",
        "50 s",
        "1.0 MiB of 2.0 GiB",
        "/ranks/llama",
        "nightly",
        "refused",
    ):
        assert word in text, word
    assert "width:50.0%" in text
    assert "<script>" not in text
    assert "<b>bad" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert [(name, part) for name, part, _ in rank_rows(now)] == [
        ((f"llama ({run.job})", "x rank 0"), 0.25),
        ((f"llama ({run.job})", "y rank 0"), 0.5),
    ]


def test_the_page_of_nothing(overseer: Overseer) -> None:
    now = overseer.look()
    assert "none waits or runs" in jobs_table(now)
    assert "none" in failures_table(now.failures)
    assert rank_rows(now) == []
