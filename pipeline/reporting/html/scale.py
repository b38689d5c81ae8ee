"""The heat map's colours: steps of equal width in dB that span what one checkpoint has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

STEPS = 6
EXACT, ONCE = "exact", "once"


@dataclass(frozen=True)
class Scale:
    """Step 0 is the best: `top` dB or more; each next one `width` dB less. `count` steps; none where there is no figure."""

    top: int
    width: int
    count: int

    def mark(self, snr_db: float | None, exact: bool, digits: int = 0) -> tuple[str, str]:
        """The text and the colour's class of a signal-to-noise ratio; `exact`: nothing was lost, or what one rounding takes."""
        if snr_db is None:
            return ("=" if exact else "∞"), EXACT
        if exact:
            return _cut(snr_db, digits), ONCE
        if not math.isfinite(snr_db):
            return str(snr_db), "s0" if snr_db > 0 else f"s{STEPS - 1}"
        return _cut(snr_db, digits), f"s{min(_steps_below(self.top, snr_db, self.width), STEPS - 1)}"

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Each step's class, a figure in it, and what it stands for, the best first."""
        edges = [self.top - n * self.width for n in range(self.count)]
        rest = [(f"s{n}", str(edge), f"{edge} to {edge + self.width}") for n, edge in enumerate(edges)]
        return [("s0", str(self.top), f"{self.top} dB or more"), *rest[1:]] if edges else []


def scale(values: Sequence[float]) -> Scale:
    """The narrowest steps of 1, 2, 5, 10, ... dB of which `STEPS` span the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Scale(0, 1, 0)
    for width in _widths():
        top = math.floor(max(finite) / width) * width
        count = 1 + _steps_below(top, min(finite), width)
        if count <= STEPS:
            return Scale(top, width, count)
    raise AssertionError


def _steps_below(top: int, value: float, width: int) -> int:
    """How many steps a value is below the first: in integers, as a float's difference may be rounded to the next step."""
    return max(-((math.floor(value) - top) // width), 0)


def _cut(value: float, digits: int) -> str:
    """A number without its further digits: rounding could show it in the next step."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}" if math.isfinite(value) else str(value)


def _widths() -> Iterator[int]:
    return (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
