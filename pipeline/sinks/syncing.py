"""Bring files, and the directories that name them, to the disk: what a power cut must not take."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.tensor.system_errors import naming
from stages.write.open_files import PARTIAL

_NO_SUCH_CALL = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # of file systems that cannot flush a directory


def sync_files(paths: Iterable[str | Path], missing_ok: bool = False) -> None:
    """Flush the contents of files to disk. Raises OSError where one cannot be opened or flushed.

    A rank file may get its final name meanwhile. `missing_ok`: leave out files that are gone: chunks of scratch that are freed.
    """
    for path in sorted(map(str, paths)):
        try:
            descriptor = _opened(path)
        except FileNotFoundError:
            if missing_ok:
                continue
            raise
        try:
            with naming(path):
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        if not path.endswith(PARTIAL):
            raise
    return os.open(path.removesuffix(PARTIAL), os.O_RDONLY)


def sync_directory(directory: Path) -> None:
    """Flush the names of a directory's files; one that is gone is left out. Raises OSError where the disk fails."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, PermissionError):  # nothing was made in a directory that cannot be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(descriptor)


def sync_names(directory: Path) -> None:
    """Flush the names of a directory's files and its own, up to the top of its file system: those above may be new, too."""
    with suppress(FileNotFoundError):
        device = directory.stat().st_dev
        for each in (directory, *directory.absolute().parents):
            if each.stat().st_dev != device:
                break
            sync_directory(each)


def sync_tree(directory: Path) -> None:
    """Flush all files in and below a directory, and their names, the directory's own included.

    Raises OSError where one cannot be flushed; files that vanish meanwhile are left out.
    """
    for folder, _, names in os.walk(directory, topdown=False):
        sync_files((Path(folder) / name for name in names), missing_ok=True)
        sync_directory(Path(folder))
    sync_names(directory)
