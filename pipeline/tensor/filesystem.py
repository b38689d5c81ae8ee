"""System calls that not every file system has, each with what is done in its place, and errors that always name their file.

| call | where it is refused | in its place |
| --- | --- | --- |
| mmap | no shared maps (FUSE, some network file systems), or no more of them | preadv (pipeline/tensor/mapping.py) |
| flock | no locks (NFS without its lock daemon, Lustre without `-o flock`) | none: the caller says so |
| fallocate | no allocation (ext3, NFS before 4.2, most of FUSE) | ftruncate: zeros, without room for them |

FALLBACKS has the errors that say so, by call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pipeline.tensor.system_errors import named, naming

NOT_THERE = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
FALLBACKS: Mapping[str, frozenset[int]] = {
    "mmap": NOT_THERE | {errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOMEM},
    "flock": NOT_THERE | {errno.ENOLCK, errno.EINVAL},
    "fallocate": NOT_THERE | {errno.EINVAL, errno.EPERM},
}


def try_lock(descriptor: int, path: object, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed; returns whether its file system has locks.

    Raises BlockingIOError where another process has it locked, and OSError, naming the file, where the call fails otherwise.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in FALLBACKS["flock"]:
            raise named(error, path) from None
        return False
    return True


def allocate(descriptor: int, path: object, size_bytes: int) -> None:
    """Make an open file at least this long, with room for it on its disk where the file system can promise that.

    os.posix_fallocate is not used: where a file system cannot, the C library writes a byte into every block, so that the disk
    writes the whole file twice. Raises OSError, naming the file, where there is no room.
    """
    if not size_bytes:
        return
    try:
        _fallocate(descriptor, size_bytes)
    except OSError as error:
        if error.errno not in FALLBACKS["fallocate"]:
            raise named(error, path) from None
        with naming(path):
            if os.fstat(descriptor).st_size < size_bytes:
                os.ftruncate(descriptor, size_bytes)


def _fallocate(descriptor: int, size_bytes: int) -> None:
    """fallocate(2), which Python does not have. Raises OSError."""
    call = _system_call()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while call(descriptor, 0, 0, size_bytes):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


@cache
def _system_call() -> Callable[..., Any] | None:
    library = ctypes.CDLL(None, use_errno=True)
    call = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call
