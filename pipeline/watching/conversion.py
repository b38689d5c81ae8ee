"""Serve the page, metrics and health of the one conversion that this process runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.planning.listen import PAGE, Listen
from pipeline.watching import server
from pipeline.watching.state import RunWatch

# (path, link text) of the pages that the conversion's page links to: headrace's own, and those of Dask's dashboard.
OWN = (("metrics", "metrics"), ("health", "health"))
DASK = (("status", "Dask's tasks"), ("workers", "workers"), ("system", "system"))


def join(application: Any, watch: RunWatch, listen: Listen) -> None:
    """Add the page, `/metrics` and `/health` to a Dask server's application. Call it in that server's event loop."""
    server.join(application, {PAGE: _page(watch, (*DASK, *OWN))}, _routes(watch), listen)


@contextmanager
def serving(watch: RunWatch, listen: Listen) -> Iterator[str]:
    """Serve the page, `/metrics` and `/health` without a dashboard, and yield the page's URL.

    Raises BadInput where the address of `listen` is taken or is not this machine's.
    """
    with server.serving(listen, {PAGE: _page(watch, OWN)}, _routes(watch)) as url:
        yield url + PAGE


def health(watch: RunWatch) -> dict[str, Any]:
    """Return the JSON object of `/health`: sizes in bytes, times in seconds."""
    now = watch.snapshot()
    return {
        "status": "ok",
        "state": now.state,
        "outputs": list(now.outputs),
        "bytes": now.done_bytes,
        "total_bytes": now.total_bytes,
        "tasks": now.tasks,
        "done_tasks": now.done_tasks,
        "idle_seconds": round(now.idle_seconds, 1),
        "eta_seconds": None if now.eta_seconds is None else round(now.eta_seconds, 1),
        "memory_bytes": now.memory_bytes,
    }


def _page(watch: RunWatch, links: Sequence[tuple[str, str]]) -> server.Page:
    """Return the function that fills the page's document."""

    def fill(document: Any) -> None:
        # Bokeh takes half a second to import, so this waits until somebody opens the page.
        from pipeline.watching.page import conversion_page

        conversion_page(watch.snapshot, links)(document)

    return fill


def _routes(watch: RunWatch) -> list[server.Route]:
    return server.routes(_metrics(watch), lambda: health(watch))


def _metrics(watch: RunWatch) -> Callable[[], bytes] | None:
    try:
        from pipeline.watching.metrics import Metrics, of_conversion
    except ModuleNotFoundError:  # prometheus_client is installed with the extra `jobs`
        return None
    return Metrics(lambda: of_conversion(watch.snapshot())).text
