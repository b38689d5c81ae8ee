"""Start Dask's dashboard and headrace's page at the first request for one of them, because Bokeh takes half a second to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tornado import web

from pipeline.planning.listen import Listen
from pipeline.watching import conversion
from pipeline.watching.state import RunWatch


class OnDemand(web.Application):
    """The last application of a Dask server: its first request calls `connect`, which adds the real pages after it."""

    def __init__(self, connect: Callable[[], None]) -> None:
        super().__init__()
        self._connect: Callable[[], None] | None = connect

    def find_handler(self, request: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Return None, so that the server goes on to the applications that have just been added."""
        connect, self._connect = self._connect, None
        if connect:
            connect()
        return None


def attend(cluster: Any, watch: RunWatch | None, listen: Listen | None) -> None:
    """Have a cluster's server answer for the dashboard's pages and, where `watch` is given, for headrace's own.

    Parameters
    ----------
    cluster
        A `distributed.LocalCluster` whose scheduler runs in this process.
    watch
        The run that headrace's page shows; None for no page.
    listen
        The address that the server was given; None for 127.0.0.1 and the port that the server has.
    """
    scheduler = cluster.scheduler

    def connect() -> None:
        import distributed.dashboard.scheduler as pages

        if watch is not None:
            conversion.join(scheduler.http_application, watch, listen or Listen(port=scheduler.http_server.port))
        pages.connect(scheduler.http_application, scheduler.http_server, scheduler)

    scheduler.http_application.add_application(OnDemand(connect))
