"""Checks of bytes that a task reads, which are made as its last act: bytes that are looked at anyway need no pass of their own.

A block that is checked as it is read cannot say at once whether what it has given is right. It says so when it has been read to its
end, or when the task ends: `settling` then calls what blocks have left to `settle`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_local = threading.local()


@contextmanager
def settling() -> Iterator[None]:
    """Make the checks that blocks have left while a task ran on this thread. Raises what a check raises.

    They are made too where values were refused, as they may tell why; not where the disk failed.
    """
    previous, _local.checks = getattr(_local, "checks", None), []
    try:
        yield
    except OSError:
        raise
    except Exception:
        _settle_all()
        raise
    else:
        _settle_all()
    finally:
        _local.checks = previous


def _settle_all() -> None:
    for check in _local.checks:
        check()


def settle(check: Callable[[], None]) -> bool:
    """Leave a check to the end of the task that runs on this thread; False where nobody would make it."""
    checks = getattr(_local, "checks", None)
    if checks is None:
        return False
    checks.append(check)
    return True
