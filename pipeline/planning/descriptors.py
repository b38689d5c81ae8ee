"""Descriptors are planned like memory: a task keeps so many files open that all together stay below the limit."""

from __future__ import annotations

import resource

from pipeline.errors import Problem

# The interpreter, a cluster's event loops and sockets, pages that are open, the libraries that are loaded meanwhile.
RESERVED = 96
OPEN_FILES = 512  # that a task keeps open at most: where it writes to more, they are opened and closed in turn
READING = 2  # a task's descriptors beside those of rank files: a piece of the source, and a chunk of scratch


def open_files(workers: int, sinks: int) -> int:
    """Return how many files each of `workers` tasks may keep open; less than 1 where the process's limit is too low for them.

    `sinks`: outputs and cuts, each of which has a journal open.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return OPEN_FILES
    return min(OPEN_FILES, (limit - RESERVED - sinks) // workers - READING)


def descriptor_problems(workers: int, sinks: int) -> list[Problem]:
    """Return a problem where this process may open fewer files than so many workers and journals need."""
    if open_files(workers, sinks) >= 1:
        return []
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = RESERVED + sinks + workers * (READING + 1)
    found = f"{limit} files that this process may open"
    return [
        Problem("RLIMIT_NOFILE", found, f"{needed} for {workers} workers", f"Set `ulimit -n {needed}`, or give fewer --workers")
    ]
