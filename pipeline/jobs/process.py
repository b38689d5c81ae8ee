"""Facts from the operating system: whether a process is still running, and how much memory there is.

A pid is used again after its process has ended. Next to each pid goes the `birth` of its process, so that the two are not confused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pipeline.sinks.journal import boot_id

KILL_SECONDS = 10.0  # for a killed process to be gone


def birth(pid: int) -> str:
    """A text that is different for each process that ever has this pid; "" where it is gone, a zombie, or cannot be seen.

    It holds the id of the machine's boot, the pid namespace and the time at which the process started.
    """
    try:
        # The command, in brackets, may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot_id()} {_namespace()} {fields[19]}"


def alive(pid: int, born: str) -> bool:
    """Whether the process still runs; true where that cannot be seen, as for one in another container."""
    boot, namespace, _ = born.split(" ") if born else ("", "", "")
    if not born or (boot == boot_id() and namespace != _namespace()):
        return True
    return birth(pid) == born


def kill(pid: int | None, born: str) -> bool:
    """Kill the process with this pid and birth, if it still runs; returns False where it cannot be killed.

    One that cannot be seen is left alone: the lock of the directory that it writes keeps others out.
    """
    end = time.monotonic() + KILL_SECONDS
    while pid is not None and born and birth(pid) == born:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _namespace() -> str:
    """The pid namespace of this process; "-" where the system does not say."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "-"


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's where that is less."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, int(limit)) if limit.isdigit() else total
