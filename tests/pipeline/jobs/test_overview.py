"""All runs at one moment: a page that escapes what it shows, counters that only grow, gauges of what is at work, and JSON."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import convert
from pipeline.jobs import overview
from pipeline.jobs.overview import Overview
from pipeline.jobs.retry import Retry
from pipeline.planning.listen import Listen
from pipeline.watching.metrics import Metrics, Reading
from pipeline.watching.server import serving
from tests.pipeline.jobs.stand_in import Stage, unit
from tests.pipeline.watching.web import fetch, free_port
from tests.support import checkpoints

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def stage() -> Stage:
    return Stage(stall_seconds=50)


@pytest.fixture
def seen(stage: Stage) -> Overview:
    return Overview(stage.fleet, "batch")


def samples(reading: Reading) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = Metrics(lambda: reading).text().decode()
    found = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(dict(found)) == len(found), "a series twice: Prometheus would refuse all"
    return dict(found)


def test_a_run_from_the_queue_to_its_end_in_metrics(stage: Stage, seen: Overview) -> None:
    (run,) = stage.queue(unit("llama"))
    found = samples(seen.reading())
    assert (found["headrace_queue_length", ()], found["headrace_jobs", (("state", "queued"),)]) == (1, 1)
    stage.start(run)
    stage.progress(run, 400, memory_bytes=7, memory_limit_bytes=9, tasks=5, done_tasks=2, ranks=[["llama", 0, 100, 300]])
    found, job = samples(seen.reading()), ("job", "1 llama")
    assert found["headrace_queue_length", ()] == 0
    assert found["headrace_jobs", (("state", "running"),)] == 1
    assert found["headrace_job_bytes", (job,)] == 400
    assert found["headrace_job_size_bytes", (job,)] == 1000
    assert found["headrace_job_eta_seconds", (job,)] == 60
    assert found["headrace_job_memory_bytes", (job,)] == 7
    assert found["headrace_job_memory_limit_bytes", (job,)] == 9
    assert found["headrace_job_done_tasks", (job,)] == 2
    assert found["headrace_rank_bytes", (job, ("rank", "0"), ("target", "llama"))] == 100
    assert found["headrace_stage_bytes_total", (("stage", "write"),)] == 400
    stage.end(run)
    found = samples(seen.reading())
    assert ("headrace_job_bytes", (job,)) not in found
    assert found["headrace_stage_bytes_total", (("stage", "write"),)] == 1000
    assert found["headrace_jobs", (("state", "done"),)] == 1
    outcome = ("outcome", "done")
    assert found["headrace_job_duration_seconds_count", (outcome,)] == 1
    assert found["headrace_job_duration_seconds_sum", (outcome,)] == 7
    assert found["headrace_job_duration_seconds_bucket", (("le", "5.0"), outcome)] == 0
    assert found["headrace_job_duration_seconds_bucket", (("le", "+Inf"), outcome)] == 1


def test_what_was_refused_before_any_attempt_took_no_time(stage: Stage, seen: Overview) -> None:
    stage.queue(unit("llama", state="refused", error="no"))
    found = samples(seen.reading())
    assert found["headrace_jobs", (("state", "refused"),)] == 1
    assert not any(name.startswith("headrace_job_duration") for name, _ in found)


def test_counters_only_grow(seen: Overview, stage: Stage) -> None:
    written = [0.0]

    def note() -> None:
        written.append(seen.reading().stages.get("write", {}).get("bytes", 0.0))

    for code, nbytes in ((3, 300), (0, 1000)):
        (run,) = stage.queue(unit("llama"))
        stage.start(run)
        note()
        for done in (100, 300):
            stage.progress(run, done)
            note()
        stage.end(run, code, written=nbytes)
        note()
    assert written == sorted(written)
    assert written[-1] == 1300


def test_runs_of_one_name_are_told_apart(seen: Overview, stage: Stage) -> None:
    first, second = stage.queue(unit("llama"), unit("other"))
    second.unit = first.unit
    for run in (first, second):
        stage.start(run)
        stage.progress(run, 10, ranks=[["llama", 0, 1, 2]])
    assert len({running.name for running in seen.reading().running}) == 2
    samples(seen.reading())


def test_what_does_not_move_grows_idle_and_stalls(seen: Overview, stage: Stage) -> None:
    (run,) = stage.queue(unit())
    stage.start(run)
    stage.progress(run, 10)
    run.moved -= 40
    stage.fleet.step()
    assert (seen.reading().stalls, round(seen.health()["running"][0]["idle_seconds"])) == (0, 40)
    run.moved -= 20
    stage.fleet.step()
    stage.fleet.step()
    assert samples(seen.reading())["headrace_stalls_total", ()] == 1
    assert "stalled" in seen.look()[0]
    stage.progress(run, 20)
    assert "stalled" not in seen.look()[0]


def test_the_page_shows_what_runs_waits_and_ended() -> None:
    again = Stage(Retry(attempts=2, first_seconds=600))
    page = Overview(again.fleet, "schedule", lambda: {"nightly <b>": "2026-03-01 02:30:00 UTC"}, "http://here:8787/status")
    running, failed, bad = again.queue(unit("running"), unit("failed"), unit("bad", state="refused", error=f"because {EVIL}"))
    again.start(running)
    again.progress(running, 512 << 20, 1 << 30, memory_bytes=1 << 20, memory_limit_bytes=2 << 20)
    again.start(failed)
    again.end(failed, 3, "the disk is full")
    body, title, ended = page.look()
    assert (title, ended) == ("2 left: headrace", False)
    assert body.index("Running") < body.index("Waiting") < body.index("Ended")
    for word in (
        "512.0 MiB of 1.0 GiB", "1.0 MiB of 2.0 MiB", '<a href="http://worker-1:8787/headrace">running</a>',
        "again at", "the disk is full", "because &lt;script&gt;", "/ranks/running",
        "<li>nightly &lt;b&gt;: 2026-03-01 02:30:00 UTC</li>", 'href="http://here:8787/status"', 'href="metrics"',
    ):  # fmt: skip
        assert word in body, word
    assert bad.state == "refused"
    failed.not_before = 0.0
    again.fleet.step()
    again.start(failed)
    assert "attempt 2" in page.look()[0]


def test_names_and_errors_are_escaped_wherever_they_stand(seen: Overview, stage: Stage) -> None:
    runs = stage.queue(*(unit(f"{EVIL}{n}") for n in range(3)))
    stage.start(runs[0])
    stage.say(runs[0], "started", page=f'http://x/"onclick="{EVIL}', dashboard="")
    stage.start(runs[1])
    stage.end(runs[1], 3, EVIL)
    body, _, _ = seen.look()
    assert "<script" not in body
    assert '"onclick' not in body
    assert body.count("&lt;script&gt;") >= 7


def test_long_tables_and_errors_are_cut(seen: Overview, stage: Stage) -> None:
    stage.queue(*(unit(str(n), state="refused", error="x" * 100_000) for n in range(overview.SHOWN + 7)))
    body, title, _ = seen.look()
    assert (body.count("<tr>"), title) == (overview.SHOWN + 1, "headrace")
    assert "and 7 more" in body
    assert len(body) < overview.SHOWN * (overview.LONGEST_ERROR + 500)


def test_a_daemon_forgets_in_memory_what_ended_long_ago_and_a_batch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "KEPT", 3)
    for name, kept in (("schedule", ["4", "5", "6"]), ("batch", [str(n) for n in range(1, 7)])):
        stage = Stage()
        page = Overview(stage.fleet, name)
        waits = stage.queue(unit("waits"))[0]
        stage.queue(*(unit(str(n), state="up_to_date") for n in range(1, 7)))
        assert [run.unit.name for run in stage.fleet.runs.values()] == ["waits", *kept]
        assert page.reading().states["up_to_date"] == 6, "counters keep what they have counted"
        assert waits.state == "queued"


def test_throughput_and_memory_are_sampled(seen: Overview, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "SAMPLE_SECONDS", 0.0)
    (run,) = stage.queue(unit())
    stage.start(run)
    for done in (100_000_000, 300_000_000):
        time.sleep(0.01)
        stage.progress(run, done, 1 << 30, memory_bytes=5 << 20, memory_limit_bytes=1 << 30)
    body, _, _ = seen.look()
    assert "5.0 MiB" in body
    assert body.count("<svg") == 2


def test_reports_of_outputs_and_nothing_else(stage: Stage, seen: Overview, tmp_path: Path) -> None:
    (tmp_path / "a.report.html").write_text("<p>a report</p>")
    (tmp_path / "secret").write_text("hidden")
    os.mkfifo(tmp_path / "b.report.html")
    run = replace(unit("llama"), outputs=(str(tmp_path / "a"), str(tmp_path / "b")))
    stage.queue(run)
    body, _, _ = seen.look()
    assert '<a href="report/1/0">report of a</a>' in body
    assert "report/1/1" not in body
    with serving(Listen(port=free_port()), seen.routes()) as base:
        assert fetch(f"{base}/report/1/0") == (200, "<p>a report</p>")
        for path in ("1/1", "2/0", "1/-1", "1/0/../secret", "1/..%2fsecret", f"{10**15}/0", "x/0"):
            assert fetch(f"{base}/report/{path}")[0] == 404, path
        assert fetch(f"{base}/report/1/0", headers={"Host": "evil.example"})[0] == 421


def test_a_report_is_made_of_an_output_that_has_none(stage: Stage, seen: Overview, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "whole", tp_size=2, scheduler="synchronous")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    run = replace(unit("llama"), outputs=(str(tmp_path / "whole"), str(broken), str(tmp_path / "model" / "none")))
    stage.queue(run)
    body, _, _ = seen.look()
    assert '<a href="report/1/0">report of whole</a> <a href="report/1/1">report of broken</a></td>' in body
    with serving(Listen(port=free_port()), seen.routes()) as base:
        status, text = fetch(f"{base}/report/1/0")
        assert status == 200
        for words in ("whole", "Not verified", "Rank sizes", "What was done"):
            assert words in text, words
        status, text = fetch(f"{base}/report/1/1")
        assert status == 200
        assert "unreadable" in text
        assert fetch(f"{base}/report/1/2")[0] == 404
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model", "whole"]  # nothing was written


def test_over_http(stage: Stage, seen: Overview) -> None:
    runs = stage.queue(unit("llama"), unit("bad", state="refused", error="no"))
    stage.start(runs[0])
    with serving(Listen(port=free_port()), seen.routes()) as base:
        said = json.loads(fetch(f"{base}/api/jobs")[1])
        assert [(run["number"], run["name"], run["state"], run["error"]) for run in said["runs"]] == [
            (2, "bad", "refused", "no"),
            (1, "llama", "running", ""),
        ]
        assert (said["runs"][1]["host"], said["next"]) == ("worker-1", {})
        health = json.loads(fetch(f"{base}/health")[1])
        assert (health["status"], health["queue_length"], health["states"]) == ("ok", 0, {"running": 1, "refused": 1})
        assert "headrace_queue_length 0.0" in fetch(f"{base}/metrics")[1]
        page = fetch(f"{base}/")[1]
        assert "<title>headrace</title>" in page
        assert "<h1>headrace batch</h1>" in page
        for method in ("POST", "PUT", "DELETE", "PATCH"):  # nothing can be changed over HTTP
            assert fetch(f"{base}/api/jobs", method, body=b"{}" if method == "POST" else None)[0] == 405
        assert runs[0].state == "running"
