"""After workers that are gone: what they held is taken from them, once nothing of theirs runs any more."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.jobs import process
from pipeline.jobs.store import Store


def recover(store: Store) -> None:
    """Have the store say what is: end attempts and workers that are gone."""
    take_over(store)
    store.bury()


def take_over(store: Store, wanted: Collection[int] = (), mine: Collection[int] = ()) -> bool:
    """End attempts whose workers are gone, and those of `wanted` whose workers are late, but none of `mine`; whether any was.

    First the process is killed, then its leases are free: in the other order two could write for a moment.
    """
    freed = False
    for attempt in store.stale(wanted):
        if attempt.id not in mine and process.kill(attempt.pid, attempt.birth):
            freed |= store.lose(attempt)
    return freed
