"""Ask the operating system how much memory a process uses."""

from __future__ import annotations

import resource
from pathlib import Path


def memory_bytes(pid: int | None = None) -> int:
    """Return the resident memory of a process in bytes, mapped file pages included (VmRSS); -1 where it is not known.

    `pid`: None for this process.
    """
    return _status("VmRSS", "self" if pid is None else str(pid))


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process in bytes, mapped file pages included (VmHWM)."""
    peak = _status("VmHWM")
    # Only outside Linux: ru_maxrss is inherited from the parent process and can be too high.
    return peak if peak >= 0 else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str, process: str = "self") -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return -1
