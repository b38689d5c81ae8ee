"""Errors of stored values against those that they stand for: figures that add up over blocks.

A block is a few hundred kilobytes, and each pass over it works on buffers that are kept, so that memory is read once.
Sums are float32 over some thousands of values, and float64 over these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.verify.values import Buffers

RUN = 4096  # values that are summed in float32
# Sums outside of these are computed in float64: squares of very small or very large values are no float32.
LEAST_SUM, GREATEST_SUM = 1e-24, 1e30
NEARLY = 1 - 2.0**-20  # ratios below it are right, however they were rounded


@dataclass(frozen=True)
class BlockPlace:
    """The place of a block of values in its tensor: its first row, and which of a rank's experts it is of."""

    row: int = 0
    expert: int | None = None

    def describe(self, index: tuple[int, ...]) -> str:
        """The indices, as text, of the value at `index` of the block."""
        front = () if self.expert is None else (self.expert,)
        return str([*front, index[0] + self.row, *index[1:]])


@dataclass
class Figures:
    """Sums over the elements of a tensor, in float64.

    `wrong`: how many differ by more than is allowed. `exact`: every value is the source's, rounded once to the type that it is
    stored in. `max_abs`: the greatest error. `worst`: the greatest ratio of an error to the one allowed there. `noise`, `power`,
    `product`, `square`: sums of the squared errors, the expected values' squares, the products of both, and the actual values'
    squares. `first`: the first wrong value: its place, the actual and the expected value. `reached`: of what shares a measured
    scale, the largest code as a part of the largest that there is (reached.py).
    """

    elements: int = 0
    wrong: int = 0
    exact: bool = True
    max_abs: float = 0.0
    worst: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    product: float = 0.0
    square: float = 0.0
    first: tuple[str, float, float] | None = field(default=None)
    reached: dict[tuple[str, float | str], float] = field(default_factory=dict)

    def equal(self, elements: int) -> None:
        """Count elements of a tensor that is the source's, bit for bit."""
        self.elements += elements

    def lossless(self, values: np.ndarray) -> None:
        """Count float32 values that are the same in both, of a tensor whose other values may have been rounded."""
        self.elements += values.size
        power = sum_of_squares(values)
        self._sum(0.0, power, power, power)

    def right(self, elements: int, greatest: float, worst: float, noise: float, power: float, square: float) -> bool:
        """Count values that are right for sure, of which sums are known; False where their product cannot be told from these."""
        if greatest and not noise < power / 8:
            return False
        self.exact = False
        self.elements += elements
        self.max_abs, self.worst = max(self.max_abs, greatest), max(self.worst, worst)
        self._sum(noise, power, (power + square - noise) / 2 if greatest else power, square if greatest else power)
        return True

    def compare(
        self,
        actual: np.ndarray,
        expected: np.ndarray,
        allowed: float | Callable[[], np.ndarray],
        place: BlockPlace = BlockPlace(),
        exact: bool = False,
        buffers: Buffers | None = None,
    ) -> None:
        """Count float32 values `actual` that stand for `expected`, each of which may differ by `allowed`.

        `allowed`: one for all, 0 or more; or what computes float32 of the values' shape, greater than 0, called where values
        differ. `place`: of the block in its tensor, to name the first wrong value. `exact`: the values are known to be
        `expected`, rounded. `buffers`: to compute in.
        """
        self.exact = self.exact and exact
        self.elements += actual.size
        if not actual.size:
            return
        error = (buffers or Buffers()).array("error", actual.shape)
        with np.errstate(all="ignore"):  # NaN and infinity are wrong, and counted
            np.abs(np.subtract(actual, expected, out=error), out=error)
            greatest = float(error.max())
            power = sum_of_squares(expected)
            if not greatest:
                self._sum(0.0, power, power, power)
                return
            self.max_abs = _greatest(self.max_abs, greatest)
            noise, square = sum_of_squares(error), sum_of_squares(actual)
            # Of values that are near one another the three sums give the fourth, better than by sums of its own that are rounded.
            near = noise < power / 8
            product = (power + square - noise) / 2 if near else float(np.multiply(actual, expected, dtype=np.float64).sum())
            self._sum(noise, power, product, square)
            if isinstance(allowed, float):
                self.worst = _greatest(self.worst, greatest / max(allowed, 1e-38))
                if not greatest <= allowed:
                    self._count(actual, expected, allowed, place)
                return
            bound = allowed()
            worst = float(np.divide(error, bound, out=error).max())
            self.worst = _greatest(self.worst, worst)
            if not worst < NEARLY:
                self._count(actual, expected, bound, place)

    def _sum(self, noise: float, power: float, product: float, square: float) -> None:
        """Add to the sums."""
        self.noise += noise
        self.power += power
        self.product += product
        self.square += square

    def _count(self, actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float, place: BlockPlace) -> None:
        """Count the wrong values of a block, and keep the first."""
        # Not <=: NaN is wrong.
        bad = ~(np.abs(actual - expected) <= allowed)
        count = int(np.count_nonzero(bad))
        if count and self.first is None:
            index = tuple(int(n) for n in np.unravel_index(int(bad.argmax()), bad.shape))
            self.first = (place.describe(index), float(actual[index]), float(expected[index]))
        self.wrong += count

    def reach(self, shared: tuple[str, float | str], part: float) -> None:
        """Take in the largest code of some values that are not all zeros, which share a scale that was measured."""
        self.reached[shared] = max(self.reached.get(shared, 0.0), part)

    def add(self, other: Figures) -> None:
        """Add the figures of other elements of the same tensor."""
        self.first = self.first or other.first
        self.exact = self.exact and other.exact
        self.max_abs, self.worst = max(self.max_abs, other.max_abs), max(self.worst, other.worst)
        for name in ("elements", "wrong", "noise", "power", "product", "square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for shared, part in other.reached.items():
            self.reach(shared, part)

    def summary(self) -> dict[str, Any]:
        """The figures as plain values: `snr_db` in dB, None where there is no error at all; `bound` is `worst`.

        Where an error is infinite, as of an infinity in a rank, `snr_db` is minus infinity and `cosine` 0.
        """
        norm = math.sqrt(self.power * self.square)
        finite = all(map(math.isfinite, (self.noise, self.power, self.product, norm)))
        snr = -math.inf if not finite else 10 * math.log10(self.power / self.noise) if self.noise and self.power else None
        relative = math.sqrt(self.noise / self.power) if self.power else 0.0
        return {
            "elements": self.elements,
            "exact": self.exact,
            "max_abs": self.max_abs,
            "relative_rms": relative if finite else math.inf,
            "snr_db": snr,
            "cosine": (self.product / norm if norm else 1.0) if finite else 0.0,
            "bound": self.worst,
        }


def sum_of_squares(values: np.ndarray) -> float:
    """The sum of float32 values' squares."""
    flat = values.reshape(-1)
    whole = len(flat) // RUN * RUN
    runs, rest = flat[:whole].reshape(-1, RUN), flat[whole:]
    total = float(np.einsum("ij,ij->i", runs, runs).sum(dtype=np.float64)) + float(np.einsum("i,i->", rest, rest))
    return total if LEAST_SUM < total < GREATEST_SUM else float(np.square(values, dtype=np.float64).sum())


def _greatest(before: float, greatest: float) -> float:
    return math.inf if math.isnan(greatest) else max(before, greatest)
