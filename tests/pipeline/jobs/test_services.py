"""`headrace serve` with its page, metrics, health, HTTP and notifications, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pipeline.jobs.receiver import receiving
from tests.pipeline.jobs.test_http import BEARER, TOKEN
from tests.pipeline.watching.web import fetch, free_port
from tests.support import browser, checkpoints
from tests.support.commands import COMMAND, headrace

HOOK_SECRET = "correct horse battery staple"
SCHEDULE = """
[[interval]]
name = "often"
every_seconds = 3600
files = ["good.toml", "bad.toml"]

[http]
token = {{ file = "token" }}

[notify]
on = ["success", "failure"]
[notify.webhook]
url = "{url}"
secret = {{ env = "HOOK_SECRET" }}
"""


class Daemon:
    """A daemon's process, and the events that it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self, event: str, **values: Any) -> dict[str, Any]:
        """The first event of a kind with these values."""

        def found() -> list[dict[str, Any]]:
            return [each for each in self.events if each["event"] == event and values.items() <= each.items()]

        with self._news:
            assert self._news.wait_for(found, 60), self.events
            return found()[0]

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._news:
                self.events.append(json.loads(line) if line.startswith("{") else {"event": "text", "message": line})
                self._news.notify_all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    for name, tp_size in (("good", 2), ("bad", 3)):
        text = f'model_dir = "model"\noutput_dir = "ranks/{name}"\ntp_size = {tp_size}\n'
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "token").write_text(TOKEN + "\n")
    return tmp_path


@contextlib.contextmanager
def daemon(folder: Path, port: int, *more: str) -> Iterator[Daemon]:
    command = [*COMMAND, "serve", str(folder / "schedule.toml"), "--store", str(folder / "jobs.db"), "--log_format", "json"]
    command += ["--listen", f"127.0.0.1:{port}", *more]
    environment = {**os.environ, "HOOK_SECRET": HOOK_SECRET}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Daemon(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_daemon_with_everything(folder: Path) -> None:
    with receiving() as receiver:
        (folder / "schedule.toml").write_text(SCHEDULE.format(url=receiver.url))
        port = free_port()
        base = f"http://127.0.0.1:{port}"
        with daemon(folder, port) as running:
            assert running.wait("page")["message"] == f"page {base}/headrace"
            running.wait("finished", name="good", outcome="done")
            running.wait("finished", name="bad", outcome="refused")
            receiver.wait(2)
            told = {json.loads(request.body)["name"]: json.loads(request.body) for request in receiver.requests}
            assert told["good"]["event"] == "success"
            assert told["bad"]["event"] == "failure"
            assert "--tp_size 3" in told["bad"]["error"]
            health = json.loads(fetch(f"{base}/health")[1])
            assert (health["status"], health["states"]["done"], health["states"]["refused"]) == ("ok", 1, 1)
            found = {
                (sample.name, tuple(sample.labels.values())): sample.value
                for family in text_string_to_metric_families(fetch(f"{base}/metrics")[1])
                for sample in family.samples
            }
            ranks = sum(path.stat().st_size for path in (folder / "ranks/good").glob("rank*"))
            assert 0 < found["headrace_stage_bytes_total", ("write",)] <= ranks
            assert found["headrace_jobs", ("done",)] == found["headrace_jobs", ("refused",)] == 1
            assert found["headrace_job_duration_seconds_count", ("done",)] == 1
            assert ("headrace_job_duration_seconds_count", ("refused",)) not in found  # no attempt was made
            jobs = {job["name"]: job for job in json.loads(fetch(f"{base}/api/jobs")[1])}
            assert jobs["good"]["state"] == "done"
            again = f"{base}/api/jobs/{jobs['good']['id']}/retry"
            assert fetch(again, "POST", {}, b"")[0] == 401
            assert fetch(again, "POST", BEARER, b"")[0] == 202
            running.wait("finished", name="good", outcome="up_to_date")
            if browser.PROGRAM:
                with browser.browser() as tab:
                    tab.open(f"{base}/headrace")
                    text = tab.wait(lambda text: "Recent failures" in text and "Throughput" in text)
                    assert tab.logged == []
                for word in ("bad", "refused", "--tp_size 3", "Bytes by stage", "write"):
                    assert word in text, word
        said = json.dumps(running.events)
        assert HOOK_SECRET not in said
        assert TOKEN not in said


def test_a_schedule_that_names_no_token_is_refused_at_the_start(folder: Path) -> None:
    (folder / "schedule.toml").write_text('[http]\ntoken = { env = "HEADRACE_NO_TOKEN" }\n')
    ran = headrace("serve", folder / "schedule.toml", "--store", folder / "jobs.db", "--listen", f"127.0.0.1:{free_port()}")
    assert ran.code == 2
    assert "http.token: found nothing at the environment variable HEADRACE_NO_TOKEN" in ran.err


def test_a_secret_in_the_schedule_itself_is_refused_and_not_repeated(folder: Path) -> None:
    (folder / "schedule.toml").write_text('[http]\ntoken = "a-token-in-plain-sight"\n[notify]\napprise = "tgram://hidden/1"\n')
    ran = headrace("serve", folder / "schedule.toml", "--store", folder / "jobs.db")
    assert ran.code == 2
    assert "http.token" in ran.err
    assert "notify.apprise" in ran.err
    assert "plain-sight" not in ran.err
    assert "hidden" not in ran.err


def test_where_to_listen_can_be_wrong(folder: Path) -> None:
    (folder / "schedule.toml").write_text("")
    ran = headrace("serve", folder / "schedule.toml", "--store", folder / "jobs.db", "--listen", "8788")
    assert ran.code == 2
    assert "--listen" in ran.err
    assert "host:port" in ran.err
