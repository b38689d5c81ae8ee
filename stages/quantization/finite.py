"""Weights and scales must be numbers: no scale fits NaN or an infinity, and a scale that is one makes no number of its codes."""

from __future__ import annotations

import numpy as np

from pipeline.errors import BadInput, Problem

_NOT = "that is not finite (NaN or infinity)"
_AS_NUMBERS = "Mend the checkpoint, or give --dequantize, which writes NaN for them: that may do for experts to which no token came"


def not_finite(name: str) -> Problem:
    """The problem of a weight that holds NaN or infinities."""
    return Problem(name, f"a value {_NOT}", "finite weights, as no scale fits it", "Mend the checkpoint")


def finite(scales: np.ndarray, name: str, remedy: str = _AS_NUMBERS) -> np.ndarray:
    """Scales of any type as they are. Raises BadInput naming what they are of (`name`) where one is NaN or an infinity."""
    if not np.isfinite(scales).all():
        raise BadInput([Problem(f"{name}: scales", f"a scale {_NOT}", "finite scales", remedy)])
    return scales
