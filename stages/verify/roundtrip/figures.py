"""How far values are from those that they stand for: figures that add up over blocks, and what each format allows.

Facts of the bounds: quantized layouts, sections 4 to 8. An element may be as far off as its format's rounding, and no further.
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
LEAST = 2.0**-24  # what float16 has below its normal numbers
SLACK = 1.01


@dataclass(frozen=True)
class Where:
    """Where a block of values is in its tensor: from which row, and of which of a rank's experts."""

    row: int = 0
    expert: int | None = None

    def say(self, index: tuple[int, ...]) -> str:
        """A value's place in the tensor, as indices."""
        front = () if self.expert is None else (self.expert,)
        return str([*front, index[0] + self.row, *index[1:]])


@dataclass
class Figures:
    """Sums over the elements of a tensor, in float64.

    `exact`: every value is the source's, rounded once to the type that it is stored in. `worst`: the greatest ratio of an error to
    what is allowed there.
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

    def compare(self, got: Tensor, wanted: Tensor, allowed: Tensor | float, where: Where = Where(), exact: bool = False) -> None:
        """Count float32 values `got` that stand for `wanted`, each of which may differ by `allowed`.

        `where` they are, for the first that is wrong. `exact`: they are known to be `wanted` rounded.
        """
        self.exact = self.exact and exact
        error = (got - wanted).abs()
        # Not <=: NaN is wrong.
        bad = ~(error <= allowed)
        count = int(bad.sum())
        if count and self.first is None:
            index = tuple(int(n) for n in bad.nonzero()[0])
            self.first = (where.say(index), float(got[index]), float(wanted[index]))
        self.elements += got.numel()
        self.wrong += count
        self.max_abs = _greatest(self.max_abs, error)
        ratio = torch.where(error > 0, error / torch.as_tensor(allowed).clamp(min=1e-38), error)
        self.worst = _greatest(self.worst, ratio)
        wide, theirs = got.double(), wanted.double()
        self.noise += float(((wide - theirs) ** 2).sum())
        self.power += float((theirs**2).sum())
        self.product += float((wide * theirs).sum())
        self.square += float((wide**2).sum())

    def add(self, other: Figures) -> None:
        """Count another's elements too."""
        self.first = self.first or other.first
        self.exact = self.exact and other.exact
        self.max_abs, self.worst = max(self.max_abs, other.max_abs), max(self.worst, other.worst)
        for name in ("elements", "wrong", "noise", "power", "product", "square"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """The figures as plain values. `snr_db` is None where there is no error at all."""
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


def _greatest(known: float, values: Tensor) -> float:
    greatest = float(values.max()) if values.numel() else 0.0
    return math.inf if math.isnan(greatest) else max(known, greatest)


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32: half a step of `dtype` at each value."""
    return values.abs() * HALF_STEPS[dtype] * SLACK + (LEAST if dtype == torch.float16 else 1e-38)


def allowed(matrix: Matrix, wanted: Tensor, start: int, dtype: torch.dtype, kept: bool) -> Tensor:
    """float32 [n, in]: how far the numbers of rows [start, start + n) of a quantized matrix may be from `wanted`.

    `dtype`: the model's. `kept`: the source's codes were kept, so that scales alone may have been rounded.
    """
    if matrix.kind == "weight-only":
        return _by_rows(wanted, matrix.bits, dtype)
    if matrix.kind == "awq":
        return 3 * rounding(wanted, dtype)
    if matrix.kind == "groupwise":
        return _kept_codes(matrix, start, len(wanted), dtype) if kept else _by_groups(matrix, wanted, dtype)
    if kept:
        # One scale and the source's codes; or the parts of a fused module, which were brought to the largest scale of theirs.
        whole = matrix.kind != "fp8" or not matrix.fused
        return rounding(wanted, torch.float32) * 4 if whole else _float8(wanted, matrix.scales(start, start + len(wanted)))
    largest = wanted.abs().amax(1, keepdim=True)
    return _float8(wanted, largest / LARGEST_FLOAT8) + 2 * rounding(wanted, dtype)


def _by_rows(wanted: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Half a step of each row's scale, which is rounded to the model's type; the largest value has no code of its own."""
    step = wanted.abs().amax(1, keepdim=True) * 2.0 ** (1 - bits)
    beyond = (wanted - step * (2 ** (bits - 1) - 1)).clamp(min=0)
    result: Tensor = (step * 0.5 + beyond) * SLACK + 3 * rounding(wanted, dtype)
    return result


def _by_groups(matrix: Matrix, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a step from -8 to 7 (or of 8 bits) that holds the group's largest value; scales are rounded."""
    groups = matrix.tensors["weights_scaling_factor"].shape[-2]
    top = 2 ** (matrix.bits - 1) - 1
    step = wanted.reshape(len(wanted), groups, -1).abs().amax(2) / top
    result: Tensor = step.repeat_interleave(wanted.shape[1] // groups, 1) * 0.55 + 4 * rounding(wanted, dtype)
    return result


def _kept_codes(matrix: Matrix, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Scales and zero points are rounded to the model's type, once each, and the zero point's product once more."""
    scales = matrix.scales(start, start + count)
    product = matrix.codes(start, start + count).float().abs() * scales.abs()
    zero = (matrix.rows(start, start + count) - matrix.codes(start, start + count).float() * scales).abs()
    return rounding(product, dtype) * 2 + rounding(zero, dtype) * 3


def _float8(wanted: Tensor, scale: Tensor) -> Tensor:
    """Half a step of float8 (e4m3): 3 bits of mantissa, and a smallest step of 2 ** -9."""
    return (wanted.abs() * 2.0**-4 + scale.abs() * 2.0**-10) * SLACK
