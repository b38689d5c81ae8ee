"""Have a cluster's server answer for headrace's page at once, and for Dask's dashboard from the first request for one of its pages.

Dask's pages are Bokeh's, which takes half a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tornado import web
from tornado.ioloop import IOLoop

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


def attended(cluster: Any, watch: RunWatch | None) -> AbstractContextManager[None]:
    """Serve the dashboard's pages and, where `watch` is given, headrace's own; at the end open pages are told how the run ended.

    Parameters
    ----------
    cluster
        A `distributed.LocalCluster` whose scheduler runs in this process.
    watch
        The run that headrace's page shows; None for no page.
    """
    scheduler = cluster.scheduler

    def connect() -> None:
        import distributed.dashboard.scheduler as pages
        from distributed.dashboard.core import BokehApplication

        from pipeline.watching.groups import graph_page, groups_page

        # Before Dask's own pages of the same paths: one cannot draw a run's stages, the other not so many tasks.
        variables = pages.template_variables(scheduler)
        ours = BokehApplication({"/graph": graph_page, "/groups": groups_page}, scheduler, template_variables=variables)
        scheduler.http_application.add_application(ours)
        ours.initialize(IOLoop.current())
        ours.start()
        pages.connect(scheduler.http_application, scheduler.http_server, scheduler)

    scheduler.http_application.add_application(OnDemand(connect))
    return nullcontext() if watch is None else conversion.joined(scheduler.http_application, watch)
