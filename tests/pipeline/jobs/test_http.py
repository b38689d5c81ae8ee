"""The daemon over HTTP: who may change what, and what everybody may read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import BadInput
from pipeline.jobs.http import serving
from pipeline.jobs.listening import DEFAULT, Http
from tests.pipeline.jobs.told import Told
from tests.pipeline.watching.web import fetch, free_port

TOKEN = "an-unguessable-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


class Served:
    def __init__(self, told: Told, base: str) -> None:
        self.told, self.base = told, base
        self.changes = 0

    def post(self, path: str, headers: dict[str, str] | None = None, method: str = "POST") -> tuple[int, dict[str, object]]:
        status, text = fetch(self.base + path, method, headers, b"" if method == "POST" else None)
        return status, json.loads(text)


@pytest.fixture
def served(told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("HEADRACE_TOKEN", TOKEN)
    made = Served(told, "")

    def changed() -> None:
        made.changes += 1

    options = Http(listen=f"127.0.0.1:{free_port()}", token={"env": "HEADRACE_TOKEN"})
    with serving(options, told.hub, told.store, changed=changed) as page:
        made.base = page.removesuffix("/headrace")
        yield made


def test_cancelling_with_the_token(served: Served, told: Told) -> None:
    run = told.queue("llama")
    status, said = served.post(f"/api/jobs/{run.job}/cancel", BEARER)
    assert (status, said["state"]) == (202, "cancelled")
    assert told.store.run(run.id).state == "cancelled"
    assert served.changes == 1


def test_retrying_with_the_token(served: Served, told: Told) -> None:
    run = told.queue("llama")
    told.finish(run, told.start(run), "failed", "no space left")
    status, said = served.post(f"/api/jobs/{run.job}/retry", BEARER)
    assert (status, said["state"], said["cause"]) == (202, "queued", "retry")
    assert said["id"] != run.id
    assert served.changes == 1


def test_what_runs_is_asked_to_stop(served: Served, told: Told) -> None:
    run = told.queue("llama")
    told.start(run)
    assert served.post(f"/api/jobs/{run.job}/cancel", BEARER)[0] == 202
    assert told.store.run(run.id).cancel_requested


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": TOKEN}, 401),
        ({"X-Token": TOKEN}, 401),
        ({"Cookie": f"token={TOKEN}"}, 401),
        ({"Authorization": "Bearer wrong"}, 403),
        ({"Authorization": f"Bearer {TOKEN}x"}, 403),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 403),
        ({"Authorization": f"Bearer {TOKEN.upper()}"}, 403),
        ({"Authorization": "Bearer \xe9"}, 403),
    ],
    ids=str,
)
@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_nothing_changes_without_the_token(served: Served, told: Told, headers: dict[str, str], status: int, action: str) -> None:
    run = told.queue("llama")
    if action == "retry":
        told.finish(run, told.start(run), "failed")
    before = told.store.runs()
    assert served.post(f"/api/jobs/{run.job}/{action}", headers)[0] == status
    assert told.store.runs() == before
    assert served.changes == 0
    # It does not say which jobs there are, either.
    assert served.post(f"/api/jobs/999/{action}", headers)[0] == status


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_changes_but_by_post(served: Served, told: Told, method: str) -> None:
    run = told.queue("llama")
    status, _ = fetch(f"{served.base}/api/jobs/{run.job}/cancel", method, BEARER)
    assert status == 405
    assert told.store.run(run.id).state == "queued"


def test_a_token_in_the_address_is_none(served: Served, told: Told) -> None:
    run = told.queue("llama")
    assert served.post(f"/api/jobs/{run.job}/cancel?token={TOKEN}&access_token={TOKEN}")[0] == 401


def test_what_cannot_be_done(served: Served, told: Told) -> None:
    run = told.queue("llama")
    assert served.post("/api/jobs/999/cancel", BEARER)[0] == 404
    status, said = served.post(f"/api/jobs/{run.job}/retry", BEARER)
    assert status == 409
    assert "queued" in str(said["error"])
    told.finish(run, told.start(run))
    assert served.post(f"/api/jobs/{run.job}/cancel", BEARER)[0] == 409
    assert fetch(f"{served.base}/api/jobs/x/cancel", "POST", BEARER, b"")[0] == 404
    assert fetch(f"{served.base}/api/jobs/{10**30}/cancel", "POST", BEARER, b"")[0] == 404
    assert served.changes == 0


def test_without_a_token_of_its_own_nothing_can_be_changed(told: Told) -> None:
    run = told.queue("llama")
    with serving(Http(listen=f"127.0.0.1:{free_port()}"), told.hub, told.store) as page:
        for headers in ({}, BEARER, {"Authorization": "Bearer "}):
            assert fetch(page.replace("/headrace", f"/api/jobs/{run.job}/cancel"), "POST", headers, b"")[0] == 403
    assert told.store.run(run.id).state == "queued"


def test_everybody_may_read(served: Served, told: Told) -> None:
    run = told.queue("llama")
    status, text = fetch(f"{served.base}/api/jobs")
    assert status == 200
    assert [(job["id"], job["name"], job["state"]) for job in json.loads(text)] == [(run.job, "llama", "queued")]
    one = json.loads(fetch(f"{served.base}/api/jobs/{run.job}")[1])
    assert [each["id"] for each in one["runs"]] == [run.id]
    assert fetch(f"{served.base}/api/jobs/999")[0] == 404
    health = json.loads(fetch(f"{served.base}/health")[1])
    assert (health["status"], health["queue_length"], health["states"]["queued"]) == ("ok", 1, 1)
    assert "headrace_queue_length 1.0" in fetch(f"{served.base}/metrics")[1]
    assert "<title>headrace</title>" in fetch(f"{served.base}/")[1]
    assert TOKEN not in text + json.dumps(one) + fetch(f"{served.base}/metrics")[1]


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert DEFAULT.address == "127.0.0.1:8788"
    assert Http().token is None


def test_another_port_where_the_usual_one_is_taken_and_none_was_asked_for(told: Told) -> None:
    with serving(Http(), told.hub, told.store) as first, serving(Http(), told.hub, told.store) as second:
        assert first != second
        for page in (first, second):
            assert page.startswith("http://127.0.0.1:")
            assert fetch(page)[0] == 200


def test_an_address_that_is_taken(told: Told) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BadInput, match=f"--listen {listen}: found"), serving(Http(listen=listen), told.hub, told.store):
            pass


@pytest.mark.parametrize("value", ["", "too short"])
def test_a_token_must_be_there_and_long(told: Told, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TOKEN", value)
    options = Http(listen=f"127.0.0.1:{free_port()}", token={"env": "HEADRACE_TOKEN"})
    with pytest.raises(BadInput, match=r"http\.token: found") as raised, serving(options, told.hub, told.store):
        pass
    assert not value or value not in str(raised.value)
