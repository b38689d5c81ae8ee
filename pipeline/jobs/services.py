"""The services that a daemon offers beside its jobs: its page, metrics and the rest of HTTP; and notifications."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from pipeline.jobs.notify import notifying
from pipeline.jobs.serve import Daemon, Service


def services(daemon: Daemon) -> list[Service]:
    """The services that the daemon's schedule asks for."""
    return [_page, *([_notifying] if daemon.schedule.notify else [])]


@contextmanager
def _page(daemon: Daemon) -> Iterator[None]:
    from pipeline.jobs.http import serving

    wake, limit = daemon.runner.wake.set, daemon.runner.limits.max_memory
    with serving(daemon.schedule.http, daemon.hub, daemon.store, memory_limit=limit, changed=wake) as url:
        if daemon.log:
            daemon.log.say("page", f"page {url}")
        yield


def _notifying(daemon: Daemon) -> AbstractContextManager[None]:
    assert daemon.schedule.notify
    return notifying(daemon.schedule.notify, daemon.hub)
