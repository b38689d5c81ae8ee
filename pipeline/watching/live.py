"""Answer for a page: the page itself, and a stream of events that brings it up to date while it is open."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from pipeline.model.tables import CONFIGS
from pipeline.planning.listen import PAGE
from pipeline.watching.look import look
from pipeline.watching.server import Guarded

SECONDS = 1.0  # between two events
TICK_SECONDS = 0.05  # between two looks whether the run has ended

# Opens and closes of streams: called with 1 when one is opened, with -1 when its last event has gone.
Count = Callable[[int], None]


class Shown(Protocol):
    """The subject of a page. `has_ended`: whether it will not change any more."""

    @property
    def has_ended(self) -> bool: ...

    def look(self) -> tuple[str, str, bool]:
        """The page's content as HTML, its title, and whether it will not change any more: all of one moment."""
        ...


@cache
def _files() -> tuple[str, str, str]:
    """The frame of all pages, its styles and its script."""
    html, css, script = ((CONFIGS / "page" / name).read_text() for name in ("page.html", "page.css", "page.js"))
    return html, look() + css, script


def document(body: str) -> str:
    """Return a whole page: its content as it is now, and a script that puts in what the server sends later."""
    html, css, script = _files()
    return html.replace("@CSS@", css).replace("@SCRIPT@", script).replace("@BODY@", body)


def policy() -> str:
    """Return a page's Content-Security-Policy: its own script and styles, and no other server."""
    digest = base64.b64encode(hashlib.sha256(_files()[2].encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; script-src 'sha256-{digest}'"


class PageHandler(Guarded):
    """Answers `GET /headrace` with the page as it is now."""

    def initialize(self, shown: Shown) -> None:
        self.shown = shown

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", policy())
        self.set_header("Cache-Control", "no-store")
        self.write(document(self.shown.look()[0]))


class LiveHandler(Guarded):
    """Answers `GET /headrace/live` with server-sent events, one a second; the last says how it ended."""

    def initialize(self, shown: Shown, count: Count) -> None:
        self.shown, self.count = shown, count
        self.gone = False

    def on_connection_close(self) -> None:
        """Note that the page was closed, so that nothing waits for it."""
        self.gone = True

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-store")
        self.count(1)
        try:
            while not self.gone:
                body, title, ended = self.shown.look()
                self.write(f"data: {json.dumps({'body': body, 'title': title, 'ended': ended})}\n\n")
                await self.flush()
                if ended:
                    return
                await self._pause()
        except StreamClosedError:
            pass
        finally:
            self.count(-1)

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + SECONDS
        while loop.time() < end and not self.shown.has_ended and not self.gone:
            await asyncio.sleep(TICK_SECONDS)


def page_routes(shown: Shown, count: Count = lambda _: None) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the page's routes for Tornado."""
    return [(PAGE, PageHandler, {"shown": shown}), (f"{PAGE}/live", LiveHandler, {"shown": shown, "count": count})]
