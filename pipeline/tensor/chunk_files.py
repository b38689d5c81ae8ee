"""Files of chunks of scratch: made at their full size by the first task that writes to them, or taken from a pool of freed ones."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from pipeline.tensor.filesystem import allocate


def pooled_name(size_bytes: int) -> str:
    """A new name for a file of this size in a pool."""
    return f"{size_bytes}-{uuid.uuid4().hex}"


def open_chunk_file(path: str, size_bytes: int, pool: str = "") -> int:
    """Open the file of a chunk for writing; the first task that does makes it, with its room taken on the disk.

    `pool`: a directory of files that a chunk of the same size may take, over memory that the system still holds for them; "" for
    none. Returns a descriptor. Raises OSError, naming the file, where there is no room.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if _take_pooled(path, size_bytes, pool):
        return os.open(path, os.O_WRONLY)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        allocate(descriptor, path, size_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _take_pooled(path: str, size_bytes: int, pool: str) -> bool:
    """Give a file of the pool, of just this size, the name of a chunk. Another task may be quicker."""
    if not pool or Path(path).exists():
        return False
    with suppress(FileNotFoundError):
        for file in Path(pool).iterdir():
            if file.name.startswith(f"{size_bytes}-"):
                with suppress(FileNotFoundError):
                    file.rename(path)
                    return True
    return False
