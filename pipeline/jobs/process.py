"""What the system says: of processes, whose births go with their pids, as a pid may stand for another a moment later; of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pipeline.sinks.journal import boot_id

KILL_SECONDS = 10.0  # for a killed process to be gone


def birth(pid: int) -> str:
    """What tells a process from every other that has had or will have its pid: the start of the machine, who numbers it, its own
    start. "" where it is gone, a zombie, or the system does not say."""
    try:
        # The command, in brackets, may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot_id()} {_namespace()} {fields[19]}"


def alive(pid: int, born: str) -> bool:
    """Whether the process still runs; true where that cannot be seen, as in another container that has numbers of its own."""
    boot, namespace, _ = born.split(" ") if born else ("", "", "")
    if not born or (boot == boot_id() and namespace != _namespace()):
        return True
    return birth(pid) == born


def kill(pid: int | None, born: str) -> bool:
    """Kill a process, if it is still that one; returns False where it cannot be killed.

    One that cannot be seen is not ours to kill: the lock of the directory that it writes keeps others out.
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
    """Who numbers the processes that this one sees."""
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
