"""An attempt on its way, on a worker of the cluster or in a thread of this process, as the fleet sees it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.jobs.attempt import attempt, on_worker

GRACE_SECONDS = 5.0  # for the word of a worker whose process has ended


def lost(client: Any) -> bool:
    """Whether a client of Dask's has closed: it does where its scheduler is gone, and does not come back in time."""
    return bool(client.status == "closed")


class There:
    """A task of Dask's. `said`: what its process ended with, as the worker told."""

    def __init__(self, client: Any, key: Any, resources: Mapping[str, float], arguments: tuple[Any, ...]) -> None:
        """`arguments`: those of `on_worker`."""
        self.said: Mapping[str, Any] | None = None
        self._client, self._stop_seconds, self._stopped = client, arguments[-1], 0.0
        priority = -arguments[0]  # in the order of the runs
        self._future = client.submit(on_worker, *arguments, key=key, resources=dict(resources), priority=priority, pure=False)

    def done(self) -> bool:
        """Whether it has ended: one that was stopped when its worker says so, or has had the time for it, or nobody can say so."""
        if lost(self._client):
            return True
        if self.said is None and self._stopped:
            return bool(time.monotonic() - self._stopped > self._stop_seconds + GRACE_SECONDS)
        return self.said is not None or bool(self._future.done())

    def result(self) -> dict[str, Any]:
        """The result of its attempt; a failure that may pass where a worker or the cluster was lost."""
        if self.said is not None:
            return dict(self.said)
        if self._future.status == "finished":
            return dict(self._future.result())
        error = self._future.exception() if self._future.status == "error" else None
        text = f"{type(error).__name__}: {error}" if error else "the cluster, or the worker that it was on, was lost"
        return {"code": 3, "error": text, "passing": True, "seconds": 0.0}

    def stop(self) -> None:
        """Have its process end in order."""
        self._stopped = self._stopped or time.monotonic()
        self.forget()

    def forget(self) -> None:
        """Take it back: it has not begun."""
        if not lost(self._client):
            self._client.cancel([self._future])


class Here:
    """A thread of this process, for a job that names a cluster of its own and so needs nothing of this one."""

    def __init__(
        self, threads: ThreadPoolExecutor, put: Callable[[Mapping[str, Any]], None], run: int, options: Any, stop_seconds: float
    ) -> None:
        self.said: Mapping[str, Any] | None = None
        self._stop = threading.Event()
        self._future = threads.submit(
            attempt, options, lambda: not self._stop.is_set(), lambda event: put({**event, "run": run}), stop_seconds
        )

    def done(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    def result(self) -> dict[str, Any]:
        """The result of its attempt."""
        return self._future.result()

    def stop(self) -> None:
        """Have its process end in order."""
        self._stop.set()

    forget = stop
