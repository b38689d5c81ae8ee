"""Ranges of an object that are fetched before they are asked for, while the ones before them are written.

Who reads a block from its beginning to its end waits for a server once, and not once a piece: some pieces are always under way.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 3  # pieces under way while one is used; the memory that a plan projects has room for them
CONNECTIONS = 64  # of a process at once

Fetch = Callable[[int, int], Any]  # the bytes [start, end) of an object


class ReadAhead:
    """Reads a run of bytes of one object by one thread, in pieces of one size, mostly in order.

    `fetch`: fetches a range, on any thread. `end`: where the run ends. Pieces that are asked for out of order are fetched then, and
    what was under way is let go.
    """

    def __init__(self, fetch: Fetch, end: int) -> None:
        self.fetch, self.end = fetch, end
        self.owner = threading.get_ident()
        self._under_way: deque[tuple[int, int, Future[Any]]] = deque()

    def read(self, start: int, end: int) -> Any:
        """The bytes [start, end) as a buffer. Raises what `fetch` raises."""
        data = self._fetched(start, end)
        if data is None:
            self.close()
            self._begin(end, end - start)
            return self.fetch(start, end)
        self._begin(end, end - start)
        try:
            return data.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of what is under way: nobody waits for it."""
        while self._under_way:
            self._under_way.popleft()[2].cancel()

    def __del__(self) -> None:
        self.close()

    def _fetched(self, start: int, end: int) -> Future[Any] | None:
        """The piece that was begun as [start, end); None where the next one begun is another."""
        if self._under_way and self._under_way[0][:2] == (start, end):
            return self._under_way.popleft()[2]
        return None

    def _begin(self, next_start: int, size: int) -> None:
        """Have AHEAD pieces of a size under way from a place on."""
        start = self._under_way[-1][1] if self._under_way else next_start
        while len(self._under_way) < AHEAD and start < self.end:
            stop = min(start + size, self.end)
            self._under_way.append((start, stop, _threads().submit(self.fetch, start, stop)))
            start = stop


_made: dict[int, ThreadPoolExecutor] = {}  # by process: threads do not survive a fork
_making = threading.Lock()


def _threads() -> ThreadPoolExecutor:
    process = os.getpid()
    with _making:
        if process not in _made:
            _made.clear()
            _made[process] = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="headrace-read")
        return _made[process]
