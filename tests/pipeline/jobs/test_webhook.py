"""The webhook: signed, repeated where that may help, never in anybody's way."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import socket
import threading
import time

import pytest

from pipeline.jobs import channels
from pipeline.jobs.channels import Outbox
from pipeline.jobs.events import Hub, JobFinished
from pipeline.jobs.notify import Notifier, Notify, notifying
from pipeline.jobs.webhook import Webhook
from tests.pipeline.jobs.receiver import receiving

SECRET = "correct horse battery staple"
FAILED = JobFinished(
    time=1.5,
    job=3,
    run=7,
    name="llama-tp2",
    outputs=("/ranks/llama-tp2",),
    attempt=2,
    outcome="failed",
    exit_code=3,
    seconds=12.0,
    bytes=5,
    bytes_read=6,
    peak_memory_bytes=7,
    error="No space left on device (/ranks/llama-tp2/rank0.safetensors.partial)",
)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)


def options(url: str, **more: object) -> Notify:
    return Notify(on=("failure",), webhook={"url": url, "secret": {"env": "HOOK_SECRET"}, **more})


def quick(options: Notify) -> Outbox:
    """The one channel of these options, with pauses of milliseconds."""
    ((channel, attempts),) = options.channels()
    return Outbox(channel, attempts, first_pause_seconds=0.01)


def tell(outbox: Outbox) -> None:
    hub = Hub()
    hub.subscribe(Notifier(("failure",), [outbox]))
    hub.publish(FAILED)


def test_the_signature_is_that_of_the_time_and_the_body() -> None:
    with receiving() as receiver, notifying(options(receiver.url), hub := Hub()):
        hub.publish(FAILED)
        receiver.wait(1)
    (request,) = receiver.requests
    timestamp = request.headers["x-headrace-timestamp"]
    expected = hmac.new(SECRET.encode(), timestamp.encode() + b"." + request.body, hashlib.sha256).hexdigest()
    assert request.headers["x-headrace-signature"] == f"sha256={expected}"
    assert abs(int(timestamp) - time.time()) < 60
    assert request.headers["content-type"] == "application/json"
    values = json.loads(request.body)
    assert values["event"] == "failure"
    assert {key: values[key] for key in ("job", "run", "name", "attempt", "outcome", "exit_code")} == {
        "job": 3,
        "run": 7,
        "name": "llama-tp2",
        "attempt": 2,
        "outcome": "failed",
        "exit_code": 3,
    }
    assert values["outputs"] == ["/ranks/llama-tp2"]
    assert values["error"].startswith("No space left")
    assert SECRET not in request.body.decode() + str(request.headers)


@pytest.mark.parametrize("answers", [(500, 503), (429,), (408, 500, 502)])
def test_it_is_repeated_until_it_arrives(answers: tuple[int, ...]) -> None:
    with receiving(*answers) as receiver:
        outbox = quick(options(receiver.url))
        tell(outbox)
        receiver.wait(len(answers) + 1)
        outbox.close(10)
    assert len(receiver.requests) == len(answers) + 1
    assert len({request.headers["x-headrace-delivery"] for request in receiver.requests}) == 1
    assert len({request.body for request in receiver.requests}) == 1


def test_attempts_have_an_end(caplog: pytest.LogCaptureFixture) -> None:
    with receiving(*[500] * 50) as receiver:
        outbox = quick(options(receiver.url, attempts=4))
        tell(outbox)
        receiver.wait(4)
        outbox.close(10)
    assert len(receiver.requests) == 4
    assert "was not delivered: the receiver answered 500" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 404, 410, 301, 302, 307, 308])
def test_what_cannot_get_better_is_not_repeated(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with receiving(status) as receiver:
        outbox = quick(options(receiver.url))
        tell(outbox)
        receiver.wait(1)
        outbox.close(10)
    assert [request.path for request in receiver.requests] == ["/hook"]
    assert f"the receiver answered {status}" in caplog.text


def test_pauses_double_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    done = threading.Event()
    monkeypatch.setattr(channels.random, "uniform", lambda *_: 1.0)
    with receiving(*[500] * 12) as receiver:
        ((channel, attempts),) = options(receiver.url, attempts=10).channels()
        outbox = Outbox(channel, attempts, first_pause_seconds=1.0)

        def wait(seconds: float) -> bool:
            pauses.append(seconds)
            if len(pauses) == 9:
                done.set()
            return False

        monkeypatch.setattr(outbox._hurry, "wait", wait)
        tell(outbox)
        assert done.wait(30)
        outbox.close(10)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_slow_receiver_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    hold = threading.Event()
    with receiving(hold=hold) as receiver, notifying(options(receiver.url, timeout_seconds=60), hub := Hub()):
        for _ in range(channels.WAITING + 50):
            hub.publish(FAILED)
        receiver.wait(1)
        assert len(receiver.requests) == 1  # and not even that one has been answered
        assert "dropped" in caplog.text
        hold.set()


def test_a_timeout_is_a_failure_like_another() -> None:
    hold = threading.Event()
    with receiving(hold=hold) as receiver:
        outbox = quick(options(receiver.url, timeout_seconds=0.2, attempts=2))
        tell(outbox)
        receiver.wait(2)
        hold.set()
        outbox.close(10)
        assert len(receiver.requests) == 2


def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/hook?token=hidden"
        outbox = quick(options(url, attempts=2))
        tell(outbox)
        while "was not delivered" not in caplog.text:
            time.sleep(0.01)
        outbox.close(10)
    assert "the receiver did not answer (ConnectionRefusedError)" in caplog.text
    assert "hidden" not in caplog.text
    assert SECRET not in caplog.text


def test_closing_waits_for_what_is_under_way_but_for_no_pause() -> None:
    with receiving(500) as receiver:
        ((channel, _),) = options(receiver.url).channels()
        outbox = Outbox(channel, 20, first_pause_seconds=1000)
        for _ in range(3):
            tell(outbox)
        receiver.wait(1)
        outbox.close(10)
        assert len(receiver.requests) == 4  # the first once more, and the two others


def test_a_fault_of_a_channel_stops_no_later_message(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Webhook):
        count = 0

        def send(self, _: object) -> None:
            self.count += 1
            if self.count == 1:
                raise RuntimeError("a secret")

    with caplog.at_level(logging.INFO):
        broken = Broken("http://127.0.0.1:1", SECRET, 1)
        outbox = Outbox(broken, 1)
        tell(outbox)
        tell(outbox)
        outbox.close(10)
    assert broken.count == 2
    assert "not delivered (RuntimeError)" in caplog.text
    assert "a secret" not in caplog.text
