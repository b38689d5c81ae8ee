"""The process's limits, which the command line may change as the process is its own."""

from __future__ import annotations

import resource
from contextlib import suppress


def raise_open_files() -> None:
    """Raise the number of files that this process may open to the most that it may ask for: the usual 1024 is for old programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # where the system has a lower bound of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
