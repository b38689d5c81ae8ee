"""What ties a child process to its parent: the word with which it may begin, and its end with the parent's."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def word(parent: int) -> bytes:
    """The bytes with which the parent of this pid has its child begin."""
    return f"go {parent}\n".encode()


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
