"""Reserve disk space for files before they are written; find which directories have to be made for them, and unmake these."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.tensor.filesystem import allocate
from pipeline.tensor.remote_path import RemotePath


def reserve(path: Path, size_bytes: int) -> None:
    """Create a file of `size_bytes` zeros, with room for it taken where the file system can, so that writing cannot run out of it.

    Raises OSError, naming the file, where there is no room.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        allocate(descriptor, path, size_bytes)
    finally:
        os.close(descriptor)


def missing(directory: Path) -> Path | None:
    """Return the topmost directory that must be made so that `directory` exists; None where it exists already.

    None in object storage, too, which has no directories.
    """
    if isinstance(directory, RemotePath):
        return None
    return next((path for path in (directory, *directory.parents)[::-1] if not path.exists()), None)


def unmake(directory: Path, created: Path | None) -> None:
    """Remove a directory that had to be made, and those above it up to `created`, which `missing` found, that hold nothing else.

    Others may have been at work there meanwhile: what they made stays. None: it was there before, and stays.
    """
    if created is None:
        return
    shutil.rmtree(directory, ignore_errors=True)
    for path in directory.parents:
        if not path.is_relative_to(created):
            return
        try:
            path.rmdir()
        except OSError:  # it is not empty
            return
