"""Which events are told, what `[notify]` may say, and that no secret shows."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BadInput
from pipeline.jobs import notify
from pipeline.jobs.files import validate
from pipeline.jobs.notify import LONGEST_ERROR, Notify, Secret, message, notifying
from pipeline.jobs.retry import Retry
from pipeline.jobs.schedule import Schedule
from tests.pipeline.jobs.receiver import receiving
from tests.pipeline.jobs.stand_in import Stage, unit

SPACE = "No space left on device"


def options(receiver_url: str, monkeypatch: pytest.MonkeyPatch, *on: str) -> Notify:
    monkeypatch.setenv("URLS", receiver_url.replace("http://", "json://user:hidden@"))
    return Notify(on=on, apprise=Secret(env="URLS"))  # type: ignore[arg-type]


def one_of_each(stage: Stage) -> None:
    """A success, a failure and a stall, and what nobody is told of."""
    stage.queue(unit("before", state="up_to_date"), unit("bad", state="refused", error="no"))
    done, failed, stalled = stage.queue(unit("done"), unit("failed"), unit("stalled"))
    for run in (done, failed, stalled):
        stage.start(run)
    stage.end(done, written=3 << 20)
    stage.end(failed, 3, SPACE)
    stalled.moved -= 700
    stage.fleet.step()
    stage.fleet.cancel(stalled.number)
    stage.end(stalled, 3, "interrupted")


@pytest.mark.parametrize(
    ("on", "titles"),
    [
        ((), []),
        (("success",), ["done done"]),
        (("failure", "stall"), ["bad refused", "failed failed", "stalled stalled"]),
        (("success", "failure", "stall"), ["bad refused", "done done", "failed failed", "stalled stalled"]),
    ],
    ids=str,
)
def test_only_what_was_asked_for_is_told(on: tuple[str, ...], titles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    with receiving() as receiver:
        with notifying(options(receiver.url, monkeypatch, *on), stage.fleet):
            one_of_each(stage)
        one_of_each(Stage())  # another fleet's
    said = [json.loads(body) for body in receiver.bodies]
    assert [each["title"] for each in said] == [f"headrace: {title}" for title in titles]
    types = {each["title"].rpartition(" ")[2]: each["type"] for each in said}
    assert {"done": "success", "failed": "failure", "refused": "failure", "stalled": "warning"}.items() >= types.items()


def test_the_words() -> None:
    stage, said = Stage(), list[tuple[str, str, str] | None]()
    stage.fleet.listeners.append(lambda event, run, values: said.append(message(event, run, values)))
    one_of_each(stage)
    told = [each for each in said if each]
    assert told[1] == ("success", "headrace: done done", "3.0 MiB written in 7 s\n/ranks/done")
    assert told[2] == ("failure", "headrace: failed failed", f"attempt 1, exit code 3\n{SPACE}\n/ranks/failed")
    assert told[3] == ("stall", "headrace: stalled stalled", "nothing written for 12 minutes")
    assert len(told) == 4


def test_what_is_tried_again_is_not_over_yet() -> None:
    stage, said = Stage(Retry(attempts=2, first_seconds=0)), list[object]()
    stage.fleet.listeners.append(lambda event, run, values: said.append(message(event, run, values)))
    (run,) = stage.queue(unit())
    stage.start(run)
    stage.end(run, 3, SPACE)
    assert not any(said)
    stage.start(run)
    stage.end(run, 3, SPACE)
    assert [each[1] for each in said if isinstance(each, tuple)] == ["headrace: llama failed"]


def test_a_long_report_is_cut() -> None:
    stage = Stage()
    (run,) = stage.queue(unit(state="refused", error="y" * 10 * LONGEST_ERROR))
    said = message("ended", run, {})
    assert said
    assert said[2].count("y") == LONGEST_ERROR


def test_what_is_not_delivered_is_tried_again_and_said_without_the_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.0)
    stage = Stage()
    with receiving() as first, receiving(500, 500) as second, receiving(500, 500, 500) as third, caplog.at_level(logging.DEBUG):
        urls = [receiver.url.replace("http://", "json://user:hidden@") for receiver in (first, second, third)]
        (tmp_path / "urls").write_text("\n".join(urls) + "\n")
        with notifying(Notify(on=("failure",), apprise=Secret(file=tmp_path / "urls")), stage.fleet):
            stage.queue(unit("bad", state="refused", error=SPACE))
            for receiver, count in ((first, 1), (second, 3), (third, 3)):
                receiver.wait(count)
    assert [len(receiver.bodies) for receiver in (first, second, third)] == [1, 3, 3]
    assert SPACE.encode() in second.bodies[-1]
    assert "Apprise URL 3 (JSON): 'headrace: bad refused' was not delivered" in caplog.text
    assert "hidden" not in caplog.text


def test_a_service_that_fails_in_an_odd_way_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "PAUSE_SECONDS", 0.0)

    class Broken:
        service_name = "Broken"

        def notify(self, **_: object) -> bool:
            raise RuntimeError("json://user:hidden@localhost")

    stage = Stage()
    with receiving() as receiver:
        made = options(receiver.url, monkeypatch, "failure")
        real = made.services()
        monkeypatch.setattr(Notify, "services", lambda _: [Broken(), *real])
        with notifying(made, stage.fleet):
            stage.queue(unit("bad", state="refused", error="no"))
            receiver.wait(1)
    assert "a notification failed (RuntimeError)" in caplog.text
    assert "hidden" not in caplog.text


def test_nobody_waits_for_a_receiver_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "WAITING", 3)
    monkeypatch.setattr(notify, "CLOSE_SECONDS", 0.1)
    let_go = threading.Event()

    class Slow:
        service_name = "Slow"

        def notify(self, **_: object) -> bool:
            return let_go.wait(30)

    monkeypatch.setattr(Notify, "services", lambda _: [Slow()])
    stage, begun = Stage(), time.monotonic()
    with notifying(Notify(on=("failure",), apprise=Secret(env="URLS")), stage.fleet):
        stage.queue(*(unit(str(n), state="refused", error="no") for n in range(10)))
    assert time.monotonic() - begun < 5
    let_go.set()
    assert 5 <= caplog.text.count("dropped 'headrace: ") <= 7


def test_urls_that_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("URLS", "json://localhost/x nosuch://hidden discord://hidden")
    with caplog.at_level(logging.DEBUG), pytest.raises(BadInput) as raised:
        Notify(apprise=Secret(env="URLS")).services()
    assert [problem.found for problem in raised.value.problems] == ["URL 2 of 3, URL 3 of 3, which Apprise does not know"]
    assert "hidden" not in str(raised.value) + caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"on": ["sucess"], "apprise": {"env": "A"}},
        {"apprise": "discord://hidden/hidden"},
        {"apprise": ["discord://hidden/hidden"]},
        {"apprise": {}},
        {"apprise": {"url": "discord://hidden"}},
        {"apprise": {"env": "A", "file": "/b"}},
        {"mail": "me", "apprise": {"env": "A"}},
        {"webhook": {"url": "https://hidden"}},
    ],
    ids=str,
)
def test_what_the_options_may_not_be(values: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"notify(\.\w+)*: found") as raised:
        validate(Schedule, {"notify": values}, "schedule.toml")
    # A report shows what was found: a secret in the wrong place must not be in it.
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(("value", "found"), [(None, "nothing at"), ("", "nothing at"), (" \n", "nothing at")])
def test_a_secret_that_is_not_there(value: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("URLS", raising=False)
    if value is not None:
        monkeypatch.setenv("URLS", value)
    with pytest.raises(BadInput, match=f"notify.apprise: found {found} the environment variable URLS"):
        Notify(apprise=Secret(env="URLS")).services()


def test_a_secret_of_a_file(tmp_path: Path) -> None:
    made = Notify(apprise=Secret(file=tmp_path / "urls"))
    with pytest.raises(BadInput, match=f"No such file or directory at {tmp_path / 'urls'}"):
        made.services()
    (tmp_path / "urls").write_bytes(b"\xff\xfe hidden")
    with pytest.raises(BadInput, match="bytes that are no text"):
        made.services()
    (tmp_path / "urls").write_text("  json://user:hidden@localhost/x\n")
    (service,) = made.services()
    assert service.service_name == "JSON"
    assert "hidden" not in repr(made)
