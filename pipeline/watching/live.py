"""Answer for the page of one conversion: the page itself, and a stream of events that brings it up to date while it is open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tornado.iostream import StreamClosedError
from tornado.web import RequestHandler

from pipeline.planning.listen import PAGE
from pipeline.watching.page import document, news, policy
from pipeline.watching.state import RunWatch

SECONDS = 1.0  # between two events
TICK_SECONDS = 0.05  # between two looks whether the run has ended

# Opens and closes of streams: called with 1 when one is opened, with -1 when its last event has gone.
Count = Callable[[int], None]


class PageHandler(RequestHandler):
    """Answers `GET /headrace` with the page as it is now."""

    def initialize(self, watch: RunWatch) -> None:
        self.watch = watch

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Content-Security-Policy", policy())
        self.set_header("Cache-Control", "no-store")
        self.write(document(self.watch.snapshot()))


class LiveHandler(RequestHandler):
    """Answers `GET /headrace/live` with server-sent events, one a second; the last says how the run ended."""

    def initialize(self, watch: RunWatch, count: Count) -> None:
        self.watch, self.count = watch, count
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
                now = self.watch.snapshot()
                self.write(f"data: {news(now)}\n\n")
                await self.flush()
                if now.ended:
                    return
                await self._pause()
        except StreamClosedError:
            pass
        finally:
            self.count(-1)

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + SECONDS
        while loop.time() < end and not self.watch.has_ended and not self.gone:
            await asyncio.sleep(TICK_SECONDS)


def page_routes(watch: RunWatch, count: Count) -> list[tuple[str, type[RequestHandler], dict[str, Any]]]:
    """Return the page's routes for Tornado."""
    return [(PAGE, PageHandler, {"watch": watch}), (f"{PAGE}/live", LiveHandler, {"watch": watch, "count": count})]
