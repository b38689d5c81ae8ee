"""The colours of the heat map: steps of equal width in dB that span the errors of one checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STEPS = 6
EXACT, ONCE = "exact", "once"


@dataclass(frozen=True)
class ColourScale:
    """Colour steps: step 0, the best, is for `top` dB or more, each next one for `width` dB less; `count` is 0 for no figures."""

    top: int
    width: int
    count: int

    def mark(self, snr_db: float | None, exact: bool, digits: int = 0) -> tuple[str, str]:
        """The text and the CSS class of a signal-to-noise ratio, None for no error; `exact`: values were at most rounded once."""
        if snr_db is None:
            return ("=" if exact else "∞"), EXACT
        if exact:
            return _truncated(snr_db, digits), ONCE
        if not math.isfinite(snr_db):
            return str(snr_db), "s0" if snr_db > 0 else f"s{STEPS - 1}"
        return _truncated(snr_db, digits), f"s{min(_steps_below(self.top, snr_db, self.width), STEPS - 1)}"

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Each step's CSS class, its lower edge, and its range in words, the best step first."""
        edges = [self.top - n * self.width for n in range(self.count)]
        rest = [(f"s{n}", str(edge), f"{edge} to {edge + self.width}") for n, edge in enumerate(edges)]
        return [("s0", str(self.top), f"{self.top} dB or more"), *rest[1:]] if edges else []


def colour_scale(values: Sequence[float]) -> ColourScale:
    """Choose the narrowest steps of 1, 2, 5, 10, ... dB of which at most `STEPS` span the finite values, in dB."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ColourScale(0, 1, 0)
    for width in _widths():
        top = math.floor(max(finite) / width) * width
        count = 1 + _steps_below(top, min(finite), width)
        if count <= STEPS:
            return ColourScale(top, width, count)
    raise AssertionError


def _steps_below(top: int, value: float, width: int) -> int:
    """The number of steps from the first down to a value: in integers, as a difference of floats could round to the next step."""
    return max(-((math.floor(value) - top) // width), 0)


def _truncated(value: float, digits: int) -> str:
    """A number without its further digits, as rounding could move it to the next step."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}" if math.isfinite(value) else str(value)


def _widths() -> Iterator[int]:
    return (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
