"""The daemon: triggers become conversions, people can step in, and it stops and starts without losing or doubling any."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import convert
from pipeline.jobs.history import History
from pipeline.jobs.log import Log
from pipeline.jobs.runs import ACTIVE, Run
from pipeline.jobs.schedule import read_schedule
from pipeline.jobs.serve import Daemon
from pipeline.jobs.watch import Arrival
from pipeline.sinks.hold import Holder, birth, holder
from tests.pipeline.jobs.daemon import Place
from tests.pipeline.jobs.receiver import receiving
from tests.pipeline.jobs.stand_in import unit, wait
from tests.pipeline.watching.web import fetch, free_port
from tests.support import browser, checkpoints
from tests.support.commands import COMMAND, headrace
from tests.support.directories import contents


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.nightly
def test_a_trigger_fires_once_and_sigterm_ends_in_order(place: Place, tmp_path: Path) -> None:
    place.often()
    with place.process() as started:
        wait(lambda: place.states() == ["done"])
        second = headrace("serve", place.schedule, "--store", place.path)
        assert (second.code, f"process {started.pid} on" in second.err) == (2, True)
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate()
    assert started.returncode == 0
    said = [json.loads(line)["event"] for line in errors.splitlines()]
    assert said == ["page", "serving", "queued", "started", "progress", "ended", "stopped"]
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "alone", tp_size=2, scheduler="threads")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not list(tmp_path.glob("*.lock*"))
    # The next one knows that it has fired.
    with place.serving():
        time.sleep(0.7)
    assert [run["cause"] for run in place.runs()] == ["often"]


@pytest.mark.nightly
def test_what_was_missed_is_made_up_for_and_what_is_done_is_not_recorded_again(place: Place, tmp_path: Path) -> None:
    place.often()
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, scheduler="threads")
    ended = []
    for _ in range(2):
        begun = time.time()
        with contextlib.closing(History(place.path, write=True)) as opened:
            opened.set_mark("fired", "often", str(begun - 7201))  # two moments missed
            with place.serving() as said:
                wait(lambda: float(opened.mark("fired", "often") or 0) > begun)  # noqa: B023
            ended += [event for event in said if event["event"] == "ended"]
    assert [run["state"] for run in place.runs()] == ["up_to_date"]
    assert len(ended) == 1


@pytest.mark.nightly
def test_sigterm_in_the_middle_leaves_a_conversion_that_the_next_daemon_ends(place: Place, tmp_path: Path) -> None:
    place.often()
    with place.process(**place.holding()) as started:
        wait(lambda: place.states() == ["running"])
        started.send_signal(signal.SIGTERM)
        started.communicate()
    assert (started.returncode, place.states()) == (0, ["queued"])
    with place.serving():
        wait(lambda: place.states() == ["interrupted", "done"])
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.nightly
def test_kill_takes_its_conversions_with_it_and_the_next_daemon_does_them(place: Place, tmp_path: Path) -> None:
    place.often()
    with place.process(**place.holding()) as started:
        wait(lambda: place.states() == ["running"])
        assert started.stderr
        said = next(event for event in map(json.loads, started.stderr) if event["event"] == "started")
        started.kill()
        started.wait()
        wait(lambda: not birth(said["pid"]))
    assert place.states() == ["running"]
    assert holder(tmp_path / "history.db.serve.lock"), "its note"
    with place.serving():
        wait(lambda: place.states() == ["interrupted", "done"])
    assert [run["cause"] for run in place.runs()] == ["often", "often"]
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.nightly
def test_people_can_cancel_and_retry_while_it_runs(place: Place, tmp_path: Path) -> None:
    place.often()
    with place.process(**place.holding()) as started:
        wait(lambda: place.states() == ["running"])
        assert "it is running" in place.jobs("retry", 1).err
        assert place.jobs("cancel", 1).out == "job 1: asked to cancel\n"
        wait(lambda: place.states() == ["cancelled"])
        assert "it ended: cancelled" in place.jobs("cancel", 1).err
        (tmp_path / "go").touch()
        assert place.jobs("retry", 1).code == 0
        wait(lambda: place.states() == ["cancelled", "done"])
        started.send_signal(signal.SIGTERM)
        started.communicate()
    assert [run["cause"] for run in place.runs()] == ["often", "retry"]
    # What is asked for while no daemon is at work is done by the next.
    assert place.jobs("retry", 1).code == 0
    with place.serving():
        wait(lambda: len(place.states()) == 3 and place.states()[2] not in ACTIVE)
    assert place.states()[2] == "up_to_date"


def test_jobs_are_listed_and_shown(place: Place) -> None:
    place.write("bad.toml", 'model_dir = "model"\noutput_dir = "bad"\ntp_size = 3\n')
    place.often()
    place.write("schedule.toml", place.schedule.read_text().replace('["job.toml"]', '["job.toml", "bad.toml"]'))
    with place.serving():
        wait(lambda: len(place.states()) == 2 and not set(place.states()) & {*ACTIVE})
    rows = json.loads(place.jobs("--json").out)
    assert {row["name"]: row["state"] for row in rows} == {"job": "done", "bad": "refused"}
    (done,) = json.loads(place.jobs("--state", "done", "--json").out)
    assert "one of queued" in place.jobs("--state", "happy").err
    shown = json.loads(place.jobs("show", done["number"], "--json").out)
    assert shown["bytes_done"] == shown["bytes_total"] > 0
    for words in ((), ("list",), ("show", done["number"])):
        ran = place.jobs(*words)
        assert (ran.code, "done" in ran.out) == (0, True)
    refused = next(row["number"] for row in rows if row["name"] == "bad")
    assert "num_attention_heads 8" in place.jobs("logs", refused).out
    assert place.jobs("show", 99).code == 2


def test_a_batch_file_that_is_wrong_shows_as_a_refused_run(place: Place) -> None:
    place.write("batch.toml", "[[matrix]]\nmodel_dir = 3\n")
    place.write("schedule.toml", '[[interval]]\nname = "bad"\nevery_seconds = 1\nfiles = ["batch.toml"]\n')
    with place.serving() as said:
        wait(lambda: place.states() == ["refused"])
        time.sleep(2)  # it fires again, and finds the same
    assert "batch.toml: matrix.0.output_dir" in place.runs()[0]["error"]
    assert [event["outcome"] for event in said if event["event"] == "ended"] == ["refused"]
    # It never became a job that could be done.
    assert "never became one" in place.jobs("retry", 1).err


def test_what_arrives_is_converted_once(place: Place, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text = """
    [[watch]]
    name = "arrivals"
    path = "in"
    every_seconds = 0.2
    settle_seconds = 0.5
    [watch.job]
    tp_size = [1, 2]
    output_dir = "out/{model}-{tp_size}"
    """
    place.write("schedule.toml", text)
    with place.serving():
        checkpoints.write(tmp_path / "in/[new] *model?", checkpoints.LLAMA, shards=2)
        wait(lambda: place.states() == ["done"])
        time.sleep(0.7)
    assert [(run["cause"], run["state"]) for run in place.runs()] == [("arrivals", "done")]
    for tp in (1, 2):
        assert (tmp_path / f"out/[new] *model?-{tp}/config.json").exists()
    assert list(tmp_path.glob("history.db.d/*")) == []
    with place.serving():
        time.sleep(1.2)
    assert len(place.runs()) == 1, "also the next daemon knows it"


def test_it_ends_at_once_while_something_is_planned(place: Place, tmp_path: Path) -> None:
    place.often()
    (tmp_path / "site").mkdir()
    place.write("site/sitecustomize.py", "import sys, time\nif '--dry_run' in sys.orig_argv:\n    time.sleep(60)\n")
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH", ""))))
    with place.process(PYTHONPATH=path) as started:
        assert started.stderr
        next(line for line in started.stderr if "serving" in line)
        time.sleep(0.3)
        begun = time.monotonic()
        started.send_signal(signal.SIGTERM)
        started.communicate()
    assert (started.returncode, place.states()) == (0, [])
    assert time.monotonic() - begun < 20


def test_a_foreign_hosts_note_is_not_guessed_to_be_of_one_that_is_gone(place: Place, tmp_path: Path) -> None:
    place.often()
    there = Holder("elsewhere", "its boot", 7, "x 1")
    (tmp_path / "history.db.serve.lock").symlink_to(json.dumps(asdict(there)))
    ran = headrace("serve", place.schedule, "--store", place.path)
    assert (ran.code, "process 7 on elsewhere" in ran.err) == (2, True)
    assert place.states() == []


def test_everything_at_once(place: Place, tmp_path: Path) -> None:
    """As a process: the page, metrics, health, JSON and notifications of a good job and a bad one."""
    place.write("bad.toml", 'model_dir = "model"\noutput_dir = "bad"\ntp_size = 3\n')
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with receiving() as receiver:
        place.often(more='[notify]\non = ["success", "failure"]\napprise = { env = "URLS" }\n')
        place.write("schedule.toml", place.schedule.read_text().replace('["job.toml"]', '["job.toml", "bad.toml"]'))
        urls = receiver.url.replace("http://", "json://user:hidden@")
        with place.process("--listen", f"127.0.0.1:{port}", URLS=urls) as started:
            receiver.wait(2)
            assert {json.loads(body)["title"] for body in receiver.bodies} == {"headrace: job done", "headrace: bad refused"}
            health = json.loads(fetch(f"{base}/health")[1])
            assert (health["status"], health["states"]) == ("ok", {"done": 1, "refused": 1})
            families = text_string_to_metric_families(fetch(f"{base}/metrics")[1])
            found = {(sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples}
            assert found["headrace_jobs", ("done",)] == found["headrace_job_duration_seconds_count", ("done",)] == 1
            assert ("headrace_job_duration_seconds_count", ("refused",)) not in found  # no attempt was made
            assert found["headrace_stage_bytes_total", ("write",)] > 0
            said = json.loads(fetch(f"{base}/api/jobs")[1])
            assert {run["name"]: run["state"] for run in said["runs"]} == {"job": "done", "bad": "refused"}
            assert list(said["next"]) == ["often"]
            for status, headers in ((421, {"Host": "evil.example"}), (403, {"Origin": "http://evil.example"})):
                assert fetch(f"{base}/headrace", headers=headers)[0] == status
            if browser.PROGRAM:
                with browser.browser() as tab:
                    tab.open(f"{base}/headrace")
                    text = tab.wait(lambda text: "Ended" in text and "Throughput" in text)
                    assert tab.logged == []
                for word in ("bad", "refused", "num_attention_heads 8", "often"):
                    assert word in text, word
            started.send_signal(signal.SIGTERM)
            _, errors = started.communicate()
    assert started.returncode == 0
    assert "hidden" not in errors
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("schedule", "more", "found"),
    [
        (None, (), "schedule.toml"),
        ("", ("--listen", "8788"), "--listen"),
        ("", ("--listen", "198.51.100.1:8788"), "--listen 198.51.100.1:8788"),
        ('[notify]\napprise = "tgram://hidden/1"\n', (), "notify.apprise"),
        ('[notify]\napprise = { env = "NOT_THERE_AT_ALL" }\n', (), "notify.apprise: found nothing at"),
        ('scheduler = "here"\n', (), "--scheduler"),
        ('[[watch]]\nname = "w"\npath = "nothing://x"\n[watch.job]\noutput_dir = "{model}"\n', (), "watch w: path"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    place: Place, schedule: str | None, more: tuple[str, ...], found: str
) -> None:
    if schedule is not None:
        place.write("schedule.toml", schedule)
    ran = headrace("serve", place.schedule, "--store", place.path, *more)
    assert (ran.code, found in ran.err, "Traceback" in ran.err, "hidden" in ran.err) == (2, True, False, False), ran


def test_a_history_that_is_not_there_is_not_made_to_be_looked_at(tmp_path: Path) -> None:
    for words in (("jobs",), ("jobs", "show", 1), ("jobs", "cancel", 1)):
        ran = headrace(*words, "--store", tmp_path / "gone.db")
        assert (ran.code, "no such file" in ran.err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_the_daemon_imports_nothing_of_what_converts() -> None:
    code = "import sys; import pipeline.jobs.serve; print(*sorted({'torch', 'zarr', 'distributed'} & set(sys.modules)))"
    ran = subprocess.run([*COMMAND[:2], "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert ran.stdout.strip() == ""


def test_what_arrives_in_a_bucket_is_read_there(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("schedule.toml", '[[watch]]\nname = "w"\npath = "in"\n[watch.job]\noutput_dir = "out/{model}-{fingerprint}"\n')
    history = History(tmp_path / "other.db", write=True)
    daemon = Daemon(read_schedule(tmp_path / "schedule.toml"), history, Log(sys.stderr, "text"))
    asked: list[str] = []
    monkeypatch.setattr(daemon, "_queue", lambda _trigger, names, _source: asked.extend(Path(name).read_text() for name in names))
    (watch, watcher), *_ = daemon._watchers
    monkeypatch.setattr(watcher, "look", lambda: [Arrival("s3://bucket/org/[m]", "[m]", "c0ffee")])
    daemon._look(watch, watcher)
    (table,) = (tomllib.loads(text)["matrix"] for text in asked)
    assert table == [{"output_dir": f"{tmp_path}/out/{{model}}-c0ffee", "model_dir": "s3://bucket/org/[m]"}]
    history.close()


def test_a_cluster_that_is_lost_ends_the_daemon_with_3_and_the_next_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.often()
    for name, value in place.holding().items():  # else a small model may be converted before the loss is felt
        monkeypatch.setenv(name, value)
    with contextlib.closing(History(place.path, write=True)) as opened:
        stream = io.StringIO()
        daemon = Daemon(read_schedule(place.schedule), opened, Log(stream, "text"))
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(daemon.run()))
        thread.start()
        wait(lambda: place.states() == ["running"])
        assert daemon.fleet
        daemon.fleet.client.close()
        thread.join()
    assert (codes, place.states()) == ([3], ["queued"])
    assert "scheduler was lost" in stream.getvalue()
    (tmp_path / "go").touch()
    with place.serving():
        wait(lambda: place.states() == ["interrupted", "done"])


def test_a_cancel_that_was_left_for_no_daemon_cancels_what_the_next_takes_up(place: Place) -> None:
    place.write("schedule.toml", "")
    with contextlib.closing(History(place.path, write=True)) as opened:
        opened.save(Run(5, unit(), "nightly"))
    assert place.jobs("cancel", 5).code == 0
    with place.serving() as said:
        wait(lambda: place.states() == ["interrupted", "cancelled"])
    assert [run["number"] for run in place.runs()] == [5, 6]
    assert not [event for event in said if event["event"] in ("started", "error")]
