"""Allows one daemon for each store, by a lock that the system releases when the daemon's process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import BadInput, Problem
from pipeline.tensor.filesystem import try_lock


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock, a file that stays. Raises BadInput, with the pid of the process that holds it, where one does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            locked = try_lock(descriptor, path)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "another"
            remedy = "Stop it first, or give each daemon a --store of its own"
            raise BadInput([Problem(str(path), f"process {holder}, a daemon on this store", "none", remedy)]) from None
        if not locked:
            found, remedy = "a file system without locks", "Give a --store on a local disk"
            raise BadInput([Problem(str(path), found, "one whose locks keep a second daemon away", remedy)])
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
