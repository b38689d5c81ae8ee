"""Standard streams that are closed or full: what nobody can read is lost, and the work that is told of goes on.

A stream that was closed before the start (`>&-`) leaves its number to the next file that is opened, which then takes what is
printed: so the numbers are taken first.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

STANDARD = (0, 1, 2)


class Unfailing(io.RawIOBase):
    """Writes to a descriptor; from the first time that this fails, what is written is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lost = False

    def write(self, data: object) -> int:
        """Write all bytes; returns how many they are."""
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        count = len(left)
        try:
            while left and not self._lost:
                left = left[os.write(self._descriptor, left) :]
        except BlockingIOError:  # a pipe that its reader has made so, and does not empty
            os.set_blocking(self._descriptor, True)
            self.write(left)
        except OSError:
            self._lost = True
        return count

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """It is."""
        return True


def keep_streams() -> None:
    """Have standard output and error never fail, where they are the process's own."""
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                _take(number)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _unfailing(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _unfailing(sys.stderr, 2)


def _take(number: int) -> None:
    """Open nothing under a number that is free."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)


def _unfailing(stream: TextIO | None, number: int) -> TextIO:
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "backslashreplace")
    if stream:
        with suppress(OSError):
            stream.flush()
    raw = Unfailing(number)
    buffered = io.BufferedWriter(raw)
    at_once = number == 2 or raw.isatty()
    return io.TextIOWrapper(buffered, encoding=encoding, errors=errors, line_buffering=at_once, write_through=number == 2)
