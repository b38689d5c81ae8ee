"""The course of a run: what had been written when, and the memory then, as headrace.json keeps it for the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

POINTS = 100  # at most: of a short text, and enough for a line


class Moment(NamedTuple):
    """The end of a task, in seconds since the epoch, the bytes that it wrote, and its process's memory then; -1 where not known."""

    ended: float
    nbytes: int
    memory_bytes: int


def course(moments: Iterable[Moment], started: float, memory_limit_bytes: int = 0) -> dict[str, Any]:
    """Thin out moments to at most POINTS.

    Parameters
    ----------
    moments
        Those of all tasks, in any order. Of several processes: each tells of itself.
    started
        When the run began, in seconds since the epoch.
    memory_limit_bytes
        The most that a process was to take.

    Returns
    -------
    dict
        `seconds` since the start, `bytes` written until then, and `memory_bytes`, the most of a process since the point before, of
        each point; `memory_limit_bytes`.
    """
    told = sorted((max(each.ended - started, 0.0), each.nbytes, each.memory_bytes) for each in moments)
    width = told[-1][0] / POINTS if told else 0.0
    points: list[list[float]] = []
    last, total = -1, 0
    for seconds, nbytes, memory in told:
        total += nbytes
        place = min(int(seconds / width), POINTS - 1) if width else 0
        if place == last:
            points[-1] = [seconds, total, max(memory, points[-1][2])]
        else:
            points.append([seconds, total, memory])
        last = place
    return {
        "seconds": [round(point[0], 3) for point in points],
        "bytes": [point[1] for point in points],
        "memory_bytes": [point[2] for point in points],
        "memory_limit_bytes": memory_limit_bytes,
    }
