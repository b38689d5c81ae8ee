"""The daemon over HTTP: its page, metrics, health, jobs as JSON; and, for who has the token, cancelling and retrying.

    GET  /headrace               the page; / leads there
    GET  /metrics                for Prometheus
    GET  /health                 {"status": "ok", ...}
    GET  /api/jobs               jobs, the one that something happened to last first
    GET  /api/jobs/7             one, with its runs and their attempts
    POST /api/jobs/7/cancel      Authorization: Bearer TOKEN
    POST /api/jobs/7/retry       Authorization: Bearer TOKEN

Nothing changes by GET. Without a token of the daemon's nothing changes at all.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tornado.web import RequestHandler

from pipeline.errors import BadInput
from pipeline.jobs import report
from pipeline.jobs.events import Hub
from pipeline.jobs.listening import DEFAULT, Http
from pipeline.jobs.overview import Overseer
from pipeline.jobs.overview_page import overview_page
from pipeline.jobs.store import JobStore
from pipeline.planning.listen import PAGE, parse_listen
from pipeline.watching import server
from pipeline.watching.metrics import Metrics

LEAST_TOKEN = 16  # characters


@contextmanager
def serving(
    options: Http, hub: Hub, store: JobStore, *, memory_limit: int | None = None, changed: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Serve all of it while the context lasts; yields the page's address.

    `memory_limit`: what all jobs may use, in bytes. `changed` is called after a job was cancelled or queued again. Raises BadInput
    where the address cannot be listened on, or the token is not where it should be.
    """
    token = options.token.read("http.token", LEAST_TOKEN) if options.token else ""
    overseer = Overseer(store)
    unsubscribe = hub.subscribe(overseer)
    arguments = {"store": store, "token": token, "changed": changed}
    routes = [
        *server.routes(Metrics(lambda: overseer.look().reading).text, lambda: health(overseer)),
        (r"/api/jobs", JobsHandler, arguments),
        (r"/api/jobs/(\d{1,18})", JobHandler, arguments),
        (r"/api/jobs/(\d{1,18})/(cancel|retry)", ChangeHandler, arguments),
    ]
    pages = {PAGE: overview_page(overseer.look, memory_limit)}
    listen = parse_listen(options.listen) if options.listen else DEFAULT
    try:
        with server.serving(listen, pages, routes, or_any_port=options.listen is None) as url:
            yield url + PAGE
    finally:
        unsubscribe()


def health(overseer: Overseer) -> dict[str, Any]:
    """The answer to `/health`: how many runs are in each state, and for how long each running one has written nothing.

    Reading these shows that the store can be read.
    """
    now = overseer.look()
    return {
        "status": "ok",
        "states": dict(now.reading.states),
        "queue_length": now.reading.queue_length,
        "running": [{"job": job.name, "idle_seconds": round(job.idle_seconds, 1)} for job in now.reading.running],
        "seconds": round(now.seconds, 1),
    }


class ApiHandler(RequestHandler):
    """The part that all handlers of `/api` share: answers and errors as JSON."""

    def initialize(self, store: JobStore, token: str, changed: Callable[[], None]) -> None:
        self.store, self.token, self.changed = store, token, changed

    def say(self, values: Any, status: int = 200) -> None:
        """Answer with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(values))

    def refuse(self, status: int, text: str) -> None:
        """Answer with what is wrong."""
        if status == 401:
            self.set_header("WWW-Authenticate", 'Bearer realm="headrace"')
        self.say({"error": text}, status)

    def write_error(self, status_code: int, **_: Any) -> None:
        """Answer in JSON to what Tornado refuses too."""
        self.refuse(status_code, self._reason)


class JobsHandler(ApiHandler):
    """`GET /api/jobs`."""

    def get(self) -> None:
        self.say([asdict(row) for row in self.store.jobs(limit=1000)])


class JobHandler(ApiHandler):
    """`GET /api/jobs/7`."""

    def get(self, number: str) -> None:
        try:
            row = self.store.job(int(number))
        except BadInput as error:
            self.refuse(404, str(error.problems[0]))
            return
        self.say(report.job(self.store, row))


class ChangeHandler(ApiHandler):
    """`POST /api/jobs/7/cancel` and `retry`: 401 without a token, 403 with a wrong one, 404 for no job, 409 where it cannot be."""

    def prepare(self) -> None:
        """Look at the token before anything else, whatever the method."""
        if self.request.method != "POST":
            self.set_header("Allow", "POST")
            self.refuse(405, "POST it")
        elif not self.token:
            self.refuse(403, "the daemon was given no token: http.token of its schedule file names one")
        else:
            scheme, _, given = self.request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not given.strip():
                self.refuse(401, "a header is missing: Authorization: Bearer TOKEN")
            # In a time that says nothing of how much of it is right.
            elif not hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode()):
                self.refuse(403, "not the token of this daemon")

    def post(self, number: str, action: str) -> None:
        try:
            row = self.store.job(int(number))
        except BadInput as error:
            self.refuse(404, str(error.problems[0]))
            return
        try:
            run = (self.store.cancel if action == "cancel" else self.store.retry)(row.id)
        except BadInput as error:
            self.refuse(409, str(error.problems[0]))
            return
        self.changed()
        self.say(asdict(run), 202)
