"""Dask's dashboard, and headrace's page beside it, made when somebody asks for one: Bokeh takes half a second to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tornado import web

from pipeline.planning.listen import Listen
from pipeline.watching.state import Watch


class OnDemand(web.Application):
    """Stands last among the applications of a Dask server, and has `connect` add more behind it the first time it is asked."""

    def __init__(self, connect: Callable[[], None]) -> None:
        super().__init__()
        self._connect: Callable[[], None] | None = connect

    def find_handler(self, request: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Never has a page itself: the server goes on to those that have just been added."""
        connect, self._connect = self._connect, None
        if connect:
            connect()
        return None


def attend(cluster: Any, watch: Watch | None, listen: Listen | None) -> None:
    """Have a cluster's server answer for the dashboard's pages, and for `watch`."""
    scheduler = cluster.scheduler

    def connect() -> None:
        import distributed.dashboard.scheduler as pages

        if watch is not None:
            from pipeline.watching import conversion

            conversion.join(scheduler.http_application, watch, listen or Listen(port=scheduler.http_server.port))
        pages.connect(scheduler.http_application, scheduler.http_server, scheduler)

    scheduler.http_application.add_application(OnDemand(connect))
