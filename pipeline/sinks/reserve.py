"""Taking room on a disk, so that it can be given back: files whose space is promised, and the directories above them."""

from __future__ import annotations

import os
from pathlib import Path


def reserve(path: Path, size_bytes: int) -> None:
    """Create a file of zeros whose blocks the file system has set aside: writing into it cannot run out of space.

    Raises OSError, naming the file, where there is no room.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        if size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def missing(directory: Path) -> Path | None:
    """The topmost directory that would have to be made to have `directory`; None where it is there."""
    return next((path for path in (directory, *directory.parents)[::-1] if not path.exists()), None)
