"""What is told of which events, what `[notify]` may say, and that no secret shows."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import BadInput
from pipeline.jobs.events import Event, Hub, JobQueued, JobStarted, Progress, Stalled
from pipeline.jobs.messages import LONGEST_ERROR, message
from pipeline.jobs.notify import Notify, notifying
from tests.pipeline.jobs.receiver import receiving
from tests.pipeline.jobs.test_webhook import FAILED

BASE: dict[str, Any] = {"time": 1.0, "job": 1, "run": 2, "name": "llama"}
STALLED = Stalled(**BASE, attempt=1, seconds=600, bytes=1 << 30, total_bytes=4 << 30)
DONE = replace(FAILED, outcome="done", exit_code=0, error="", bytes=3 << 20)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (DONE, "success"),
        (FAILED, "failure"),
        (replace(FAILED, outcome="refused"), "failure"),
        (replace(FAILED, outcome="crashed"), "failure"),
        (STALLED, "stall"),
        (replace(FAILED, retry_seconds=30.0), None),  # it is not over yet
        (replace(DONE, outcome="up_to_date"), None),
        (replace(FAILED, outcome="cancelled"), None),
        (replace(FAILED, outcome="interrupted"), None),
        (JobQueued(**BASE, outputs=(), cause="batch"), None),
        (JobStarted(**BASE, outputs=(), attempt=1, pid=1), None),
        (Progress(**BASE, attempt=1, bytes=1, total_bytes=2, bytes_per_second=1, eta_seconds=1, layer="x"), None),
    ],
    ids=str,
)
def test_what_is_worth_saying(event: Event, kind: str | None) -> None:
    said = message(event)
    assert (said.kind if said else None) == kind
    if said:
        assert said.title.startswith(f"headrace: {event.name} ")
        assert said.values["event"] == kind
        assert said.values["run"] == event.run


def test_the_words() -> None:
    said = message(FAILED)
    assert said
    assert said.title == "headrace: llama-tp2 failed"
    assert said.body.splitlines() == ["attempt 2, exit code 3", FAILED.error, "/ranks/llama-tp2"]
    stalled = message(STALLED)
    assert stalled
    assert stalled.body == "nothing written for 10 minutes; 1.0 GiB of 4.0 GiB done"


def test_a_long_report_is_cut() -> None:
    said = message(replace(FAILED, error="x" * 10 * LONGEST_ERROR))
    assert said
    assert len(said.values["error"]) == LONGEST_ERROR
    assert len(said.body) < 2 * LONGEST_ERROR


@pytest.mark.parametrize("kinds", [(), ("success",), ("failure", "stall"), ("success", "failure", "stall")])
def test_only_what_was_asked_for(kinds: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", "s" * 16)
    with receiving() as receiver:
        options = Notify(on=kinds, webhook={"url": receiver.url, "secret": {"env": "HOOK_SECRET"}})
        with notifying(options, hub := Hub()):
            for event in (DONE, FAILED, STALLED):
                hub.publish(event)
        hub.publish(FAILED)  # after its end
    assert [json.loads(request.body)["event"] for request in receiver.requests] == [
        kind for kind in ("success", "failure", "stall") if kind in kinds
    ]


def test_apprise_reaches_what_it_reaches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as first, receiving(500, 500, 500) as second, caplog.at_level(logging.DEBUG):
        urls = [receiver.url.replace("http://", "json://user:hidden@") for receiver in (first, second)]
        (tmp_path / "urls").write_text("\n".join(urls) + "\n")
        with notifying(Notify(on=("failure",), apprise={"file": tmp_path / "urls"}), hub := Hub()):
            hub.publish(FAILED)
        assert b"headrace: llama-tp2 failed" in first.requests[0].body
        assert b"No space left" in first.requests[0].body
        assert len(first.requests) == 1
        assert len(second.requests) >= 1
    assert "Apprise URL 2 (JSON): 'headrace: llama-tp2 failed' was not delivered" in caplog.text
    assert "hidden" not in caplog.text


def test_apprise_urls_that_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("URLS", "json://localhost/x nosuch://hidden discord://hidden")
    with caplog.at_level(logging.DEBUG), pytest.raises(BadInput) as raised:
        Notify(apprise={"env": "URLS"}).channels()
    assert [problem.found.split(",")[0] for problem in raised.value.problems] == ["URL 2 of 3", "URL 3 of 3"]
    assert "hidden" not in str(raised.value) + caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"on": ["sucess"]},
        {"webhook": {"url": "https://example.com"}},
        {"webhook": {"url": "https://example.com", "secret": "hidden-hidden-hidden"}},
        {"webhook": {"url": "https://example.com", "secret": {"value": "hidden-hidden-hidden"}}},
        {"webhook": {"url": "https://example.com", "secret": {}}},
        {"webhook": {"url": "https://example.com", "secret": {"env": "A", "file": "/b"}}},
        {"webhook": {"url": "https://me:hidden@example.com/x", "secret": {"env": "A"}}},
        {"webhook": {"url": "ftp://example.com", "secret": {"env": "A"}}},
        {"webhook": {"url": "https://", "secret": {"env": "A"}}},
        {"webhook": {"url": "https://example.com", "secret": {"env": "A"}, "attempts": 0}},
        {"apprise": "discord://hidden/hidden"},
        {"apprise": ["discord://hidden/hidden"]},
        {"mail": "me"},
    ],
    ids=str,
)
def test_what_the_options_may_not_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        Notify(**options)
    # A report shows what was found: a secret in the wrong place must not be in it.
    assert "hidden" not in str([error.get("input") for error in raised.value.errors()]) + str(raised.value)


@pytest.mark.parametrize(("value", "found"), [(None, "nothing at"), ("short", "5 characters at"), ("", "nothing at")])
def test_a_secret_that_is_not_there(value: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("HOOK_SECRET", value)
    with pytest.raises(BadInput, match=f"notify.webhook.secret: found {found} the environment variable HOOK_SECRET"):
        Notify(webhook={"url": "https://example.com", "secret": {"env": "HOOK_SECRET"}}).channels()


def test_a_secret_of_a_file(tmp_path: Path) -> None:
    options = {"url": "https://example.com", "secret": {"file": tmp_path / "secret"}}
    with pytest.raises(BadInput, match=f"No such file or directory at {tmp_path / 'secret'}"):
        Notify(webhook=options).channels()
    (tmp_path / "secret").write_text("  correct horse battery staple\n")
    made = Notify(webhook=options)
    ((channel, attempts),) = made.channels()
    assert (channel.name, attempts) == ("webhook", 5)
    assert "correct horse" not in repr(made) + repr(channel)
