"""The page, metrics and health of the one conversion that this process does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.watching import server
from pipeline.watching.listen import PAGE, Listen
from pipeline.watching.page import LINKS, conversion_page
from pipeline.watching.state import Watch


def join(application: Any, watch: Watch, listen: Listen) -> None:
    """Add them to a Dask server's application; to be called in its event loop."""
    server.join(application, {PAGE: conversion_page(watch.snapshot)}, _routes(watch), listen)


@contextmanager
def serving(watch: Watch, listen: Listen) -> Iterator[str]:
    """Serve them where there is no dashboard; yields the page's address. Raises BadInput where `listen` cannot be had."""
    links = [link for link in LINKS if link[0] in ("metrics", "health")]
    with server.serving(listen, {PAGE: conversion_page(watch.snapshot, links)}, _routes(watch)) as url:
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


def _routes(watch: Watch) -> list[server.Route]:
    return server.routes(_metrics(watch), lambda: health(watch))


def _metrics(watch: Watch) -> Callable[[], bytes] | None:
    try:
        from pipeline.watching.metrics import Metrics, of_conversion
    except ModuleNotFoundError:  # it comes with the extra `jobs`
        return None
    return Metrics(lambda: of_conversion(watch.snapshot())).text
