"""Recovers from workers that are gone: their leases are freed once none of their processes runs any more."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.jobs import process
from pipeline.jobs.store import JobStore


def recover(store: JobStore) -> None:
    """End the attempts and workers whose processes are gone, so that the store says what is really running."""
    take_over(store)
    store.bury()


def take_over(store: JobStore, wanted: Collection[int] = (), mine: Collection[int] = ()) -> bool:
    """End attempts whose workers are gone, and those of `wanted` whose workers are late, but none of `mine`; whether any was.

    First the process is killed, then its leases are free: in the other order two could write for a moment.
    """
    freed = False
    for attempt in store.stale(wanted):
        if attempt.id not in mine and process.kill(attempt.pid, attempt.birth):
            freed |= store.lose(attempt)
    return freed
