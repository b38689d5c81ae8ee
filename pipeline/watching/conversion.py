"""The page, metrics and health of the one conversion that this process does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.planning.listen import PAGE, Listen
from pipeline.watching import server
from pipeline.watching.state import Watch

# (path, text) of the pages beside ours: headrace's own, and those of Dask's dashboard.
OWN = (("metrics", "metrics"), ("health", "health"))
DASK = (("status", "Dask's tasks"), ("workers", "workers"), ("system", "system"))


def join(application: Any, watch: Watch, listen: Listen) -> None:
    """Add them to a Dask server's application; to be called in its event loop."""
    server.join(application, {PAGE: _page(watch, (*DASK, *OWN))}, _routes(watch), listen)


@contextmanager
def serving(watch: Watch, listen: Listen) -> Iterator[str]:
    """Serve them where there is no dashboard; yields the page's address. Raises BadInput where `listen` cannot be had."""
    with server.serving(listen, {PAGE: _page(watch, OWN)}, _routes(watch)) as url:
        yield url + PAGE


def health(watch: Watch) -> dict[str, Any]:
    """What `/health` says of a conversion: sizes in bytes, times in seconds."""
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


def _page(watch: Watch, links: Sequence[tuple[str, str]]) -> server.Page:
    """The page; what it is made of is imported when somebody opens it."""

    def fill(document: Any) -> None:
        from pipeline.watching.page import conversion_page

        conversion_page(watch.snapshot, links)(document)

    return fill


def _routes(watch: Watch) -> list[server.Route]:
    return server.routes(_metrics(watch), lambda: health(watch))


def _metrics(watch: Watch) -> Callable[[], bytes] | None:
    try:
        from pipeline.watching.metrics import Metrics, of_conversion
    except ModuleNotFoundError:  # it comes with the extra `jobs`
        return None
    return Metrics(lambda: of_conversion(watch.snapshot())).text
