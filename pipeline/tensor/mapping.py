"""Bytes of a file as an array: mapped, or read where the file system has no maps."""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np

from pipeline.tensor.filesystem import FALLBACKS
from pipeline.tensor.system_errors import naming


def file_bytes(descriptor: int, path: str, start: int, stop: int) -> np.ndarray:
    """Return bytes `start` to `stop` of an open file: mapped until the array is dropped, or a copy where it cannot be mapped.

    Raises OSError, naming the file, where it cannot be read or is shorter.
    """
    with naming(path):
        aligned = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(descriptor, stop - aligned, access=mmap.ACCESS_READ, offset=aligned)
        except OSError as error:
            if error.errno not in FALLBACKS["mmap"]:
                raise
        else:
            return np.frombuffer(pages, dtype=np.uint8, count=stop - start, offset=start - aligned)
        result = np.empty(stop - start, dtype=np.uint8)
        left = memoryview(result.data)
        while left:
            count = os.preadv(descriptor, [left], stop - len(left))
            if not count:
                raise OSError(errno.EIO, "it has become shorter while being read")
            left = left[count:]
        result.flags.writeable = False
        return result
