"""Draw the run over time as the page of a conversion does: throughput, and memory with its limit."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from pipeline.reporting.html.provenance import Course
from pipeline.watching.charts import timeline

STEPS = 40  # of the line of throughput, at most: tasks end at moments of their own, between which bytes are spread evenly
LARGEST = 2.0**80  # beyond, a number is none of a run


def course_charts(course: Course) -> Markup:
    """Return two sections of HTML, or none where headrace.json has fewer than two moments, or some that no run has."""
    told = list(zip(course.seconds, course.bytes, course.memory_bytes, strict=False))
    numbers = [*(number for moment in told for number in moment), course.memory_limit_bytes]
    ordered = all(before[:2] <= after[:2] and before[1] <= after[1] for before, after in pairwise(told))
    usable = ordered and all(math.isfinite(number) and -1 <= number <= LARGEST for number in numbers)
    if len(told) < 2 or not usable or told[-1][0] <= 0 or told[0][0] < 0:
        return Markup("")
    memory = [(seconds, held) for seconds, _, held in told if held >= 0]
    charts = timeline("Throughput", throughput(told), colour="blue", rate=True)
    if memory:
        limit = course.memory_limit_bytes if course.memory_limit_bytes > 0 else None
        charts += timeline("Memory of a process, and its limit" if limit else "Memory", memory, colour="teal", limit=limit)
    return Markup(charts)


def throughput(told: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Return (seconds, bytes per second) in steps of equal time. `told`: (seconds, bytes until then, memory)."""
    times, totals = [0.0, *(moment[0] for moment in told)], [0.0, *(moment[1] for moment in told)]
    grid = np.linspace(0.0, times[-1], min(STEPS, len(told)) + 1)
    rates = np.diff(np.interp(grid, times, totals)) / np.diff(grid)
    return [(0.0, float(rates[0])), *zip(grid[1:].tolist(), rates.tolist(), strict=True)]
