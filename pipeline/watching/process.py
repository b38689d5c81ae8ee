"""The memory of a process, as the system counts it."""

from __future__ import annotations

import resource
from pathlib import Path


def memory_bytes(pid: int | None = None) -> int:
    """The memory that a process (this one) holds now, mapped file pages included (VmRSS); -1 where the system does not say."""
    return _status("VmRSS", "self" if pid is None else str(pid))


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far, mapped file pages included (VmHWM)."""
    peak = _status("VmHWM")
    # Not on Linux; elsewhere a process inherits this figure from its parent.
    return peak if peak >= 0 else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str, process: str = "self") -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return -1
