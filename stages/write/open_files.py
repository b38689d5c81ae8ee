"""The files that a task writes to: a bounded number of them open at once."""

from __future__ import annotations

import contextlib
import os

from pipeline.tensor.chunk_files import open_chunk_file
from pipeline.tensor.system_errors import naming
from stages.write.deliveries import Delivery

PARTIAL = ".partial"  # the end of a rank file's name until its output is whole
OPEN_FILES = 64  # that a task keeps open where nobody has counted what its process may open


def _opened(path: str) -> int:
    """Open a file of an output, which has its last name where a worker was lost that had begun to name the files of the output.

    What it wrote and only it knew of is written again, the same bytes. No other run's file has that name meanwhile: a run begins by
    removing those.
    """
    try:
        return os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):
            if path.endswith(PARTIAL):
                return os.open(path.removesuffix(PARTIAL), os.O_WRONLY)
        raise


class OpenFiles:
    """The files that a task writes to, open as long as it lasts, up to a number: then the one used longest ago is closed.

    `paths`: of all files so far.
    """

    def __init__(self, pool: str = "", most: int = OPEN_FILES) -> None:
        self.pool, self.most = pool, max(most, 1)
        self.paths: dict[str, None] = {}
        self._open: dict[str, int] = {}

    def descriptor(self, delivery: Delivery) -> int:
        """The descriptor of a delivery's file, until the next is asked for; a chunk of scratch is made where it is not there."""
        path = delivery.path
        descriptor = self._open.pop(path, -1)
        if descriptor < 0:
            while len(self._open) >= self.most:
                os.close(self._open.pop(next(iter(self._open))))
            if delivery.file_bytes and path not in self.paths:
                descriptor = open_chunk_file(path, delivery.file_bytes, self.pool)
            else:
                descriptor = _opened(path)
        self.paths[path] = None
        self._open[path] = descriptor
        return descriptor

    def synchronize(self) -> None:
        """Flush all files to disk."""
        for path in self.paths:
            descriptor = self._open.get(path, -1)
            closed = descriptor < 0
            if closed:
                descriptor = _opened(path)
            try:
                with naming(path):
                    os.fdatasync(descriptor)
            finally:
                if closed:
                    os.close(descriptor)

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
