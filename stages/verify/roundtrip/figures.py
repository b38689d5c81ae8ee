"""Errors of stored values against those that they stand for: figures that add up over blocks, and the error that a format allows.

The bounds follow docs/format/quantized-layouts.md, sections 4 to 8: an element may be off by its format's rounding, and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.verify.matrices import Matrix

LARGEST_FLOAT8 = 448.0
HALF_STEPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
LEAST = 2.0**-24  # the step of float16 below its normal numbers
SLACK = 1.01  # for the rounding of the bounds themselves


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
    squares. `first`: the first wrong value: its place, the actual and the expected value.
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

    def equal(self, elements: int) -> None:
        """Count elements that are the same, bit for bit."""
        self.elements += elements

    def compare(
        self, actual: Tensor, expected: Tensor, allowed: Tensor | float, place: BlockPlace = BlockPlace(), exact: bool = False
    ) -> None:
        """Count float32 values `actual` that stand for `expected`, each of which may differ by `allowed`.

        `place`: of the block in its tensor, to name the first wrong value. `exact`: the values are known to be `expected`, rounded.
        """
        self.exact = self.exact and exact
        error = (actual - expected).abs()
        # Not <=: NaN is wrong.
        bad = ~(error <= allowed)
        count = int(bad.sum())
        if count and self.first is None:
            index = tuple(int(n) for n in bad.nonzero()[0])
            self.first = (place.describe(index), float(actual[index]), float(expected[index]))
        self.elements += actual.numel()
        self.wrong += count
        self.max_abs = _greatest(self.max_abs, error)
        ratio = torch.where(error > 0, error / torch.as_tensor(allowed).clamp(min=1e-38), error)
        self.worst = _greatest(self.worst, ratio)
        actual64, expected64 = actual.double(), expected.double()
        self.noise += float(((actual64 - expected64) ** 2).sum())
        self.power += float((expected64**2).sum())
        self.product += float((actual64 * expected64).sum())
        self.square += float((actual64**2).sum())

    def add(self, other: Figures) -> None:
        """Add the figures of other elements of the same tensor."""
        self.first = self.first or other.first
        self.exact = self.exact and other.exact
        self.max_abs, self.worst = max(self.max_abs, other.max_abs), max(self.worst, other.worst)
        for name in ("elements", "wrong", "noise", "power", "product", "square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """The figures as plain values: `snr_db` in dB, None where there is no error at all; `bound` is `worst`."""
        norm = math.sqrt(self.power * self.square)
        return {
            "elements": self.elements,
            "exact": self.exact,
            "max_abs": self.max_abs,
            "relative_rms": math.sqrt(self.noise / self.power) if self.power else 0.0,
            "snr_db": 10 * math.log10(self.power / self.noise) if self.noise and self.power else None,
            "cosine": self.product / norm if norm else 1.0,
            "bound": self.worst,
        }


def _greatest(before: float, values: Tensor) -> float:
    greatest = float(values.max()) if values.numel() else 0.0
    return math.inf if math.isnan(greatest) else max(before, greatest)


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a step of `dtype` at each value: float32, of the shape of `values`."""
    return values.abs() * HALF_STEPS[dtype] * SLACK + (LEAST if dtype == torch.float16 else 1e-38)


def allowed(matrix: Matrix, expected: Tensor, start: int, dtype: torch.dtype, kept: bool) -> Tensor:
    """The error that the format of a quantized matrix allows at each element.

    `expected`: float32 [n, in_features], the source's numbers for rows [start, start + n) of `matrix`. `dtype`: the model's.
    `kept`: the source's codes were kept, so that scales alone may have been rounded. Returns float32 [n, in_features].
    """
    if matrix.kind == "weight-only":
        return 2 * rounding(expected, dtype) if kept else _by_rows(expected, matrix.bits, dtype)
    if matrix.kind == "awq":
        return 3 * rounding(expected, dtype)
    if matrix.kind == "groupwise":
        return _kept_codes(matrix, start, len(expected), dtype) if kept else _by_groups(matrix, expected, dtype)
    if kept:
        # One scale and the source's codes; or the parts of a fused module, which were brought to the largest scale of expected64.
        whole = matrix.kind not in ("fp8", "nvfp4") or not matrix.fused
        return rounding(expected, torch.float32) * 4 if whole else _float8(expected, matrix.scales(start, start + len(expected)))
    largest = expected.abs().amax(1, keepdim=True)
    return _float8(expected, largest / LARGEST_FLOAT8) + 2 * rounding(expected, dtype)


def _by_rows(expected: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Weight-only: half a step of each row's scale, which is rounded; the largest value of a row has no code of its own."""
    step = expected.abs().amax(1, keepdim=True) * 2.0 ** (1 - bits)
    beyond = (expected - step * (2 ** (bits - 1) - 1)).clamp(min=0)
    result: Tensor = (step * 0.5 + beyond) * SLACK + 3 * rounding(expected, dtype)
    return result


def _by_groups(matrix: Matrix, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Groupwise: half a step of codes from -8 to 7 (or of 8 bits) that reach the group's largest value; scales are rounded."""
    groups = matrix.tensors["weights_scaling_factor"].shape[-2]
    top = 2 ** (matrix.bits - 1) - 1
    step = expected.reshape(len(expected), groups, -1).abs().amax(2) / top
    result: Tensor = step.repeat_interleave(expected.shape[1] // groups, 1) * 0.55 + 4 * rounding(expected, dtype)
    return result


def _kept_codes(matrix: Matrix, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Groupwise with the source's codes: scales and zero points are rounded, the zero point's product twice."""
    scales = matrix.scales(start, start + count)
    product = matrix.codes(start, start + count).float().abs() * scales.abs()
    zero = (matrix.rows(start, start + count) - matrix.codes(start, start + count).float() * scales).abs()
    return rounding(product, dtype) * 2 + rounding(zero, dtype) * 3


def _float8(expected: Tensor, scale: Tensor) -> Tensor:
    """Half a step of float8 (e4m3): 3 bits of mantissa, and a smallest step of 2 ** -9."""
    return (expected.abs() * 2.0**-4 + scale.abs() * 2.0**-10) * SLACK
