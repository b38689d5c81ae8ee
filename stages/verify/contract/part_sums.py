"""The checksums of a tensor's parts in headrace.json, held against its bytes as these are read in their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from pipeline.errors import Problem
from pipeline.tensor.system_errors import REMEDIES

Sums = Sequence[tuple[int, str]]  # (bytes, 64-bit xxh3 in hexadecimal digits) of each of a tensor's consecutive parts
_DAMAGED = "The file was changed or damaged after it was written: convert again, or copy it again"


class RunningSums:
    """The sums of a tensor's parts, from byte `start` of it on.

    `problem`: the first part whose bytes are others than were written; None as long as there is none.
    """

    def __init__(self, subject: str, sums: Sums, start: int = 0) -> None:
        self.problem: Problem | None = None
        self._subject, self._left, self._start = subject, list(sums), start
        self._digest, self._seen = xxhash.xxh3_64(), 0

    def update(self, data: np.ndarray) -> None:
        """Take in the bytes that come next, uint8 [bytes]; those behind the last part are of none."""
        while len(data) and self._left and not self.problem:
            nbytes, digest = self._left[0]
            some = data[: nbytes - self._seen]
            self._digest.update(some.data)
            self._seen += len(some)
            data = data[len(some) :]
            if self._seen == nbytes:
                self._end(nbytes, digest)

    def _end(self, nbytes: int, digest: str) -> None:
        if self._digest.hexdigest() != digest:
            found = f"other bytes than were written, among its bytes {self._start:,} to {self._start + nbytes:,}"
            self.problem = Problem(self._subject, found, f"the xxh3 {digest} of headrace.json", _DAMAGED)
        self._start, self._seen = self._start + nbytes, 0
        del self._left[0]
        self._digest = xxhash.xxh3_64()


def unreadable(subject: str, error: OSError) -> Problem:
    """The problem of a rank's tensor that cannot be read."""
    return Problem(subject, str(error), "a tensor that can be read", REMEDIES.get(error.errno or 0, _DAMAGED))
