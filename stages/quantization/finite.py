"""Weights must be numbers: no scale fits NaN or an infinity."""

from __future__ import annotations

from pipeline.errors import Problem


def not_finite(name: str) -> Problem:
    """The problem of a weight that holds NaN or infinities."""
    return Problem(
        name, "a value that is not finite (NaN or infinity)", "finite weights, as no scale fits it", "Mend the checkpoint"
    )
