"""Ties a child process to its parent: it waits for the parent's word before it begins, and ends when the parent ends."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def word(parent: int) -> bytes:
    """The line that the parent with this pid writes to its child's standard input to let it begin."""
    return f"go {parent}\n".encode()


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
