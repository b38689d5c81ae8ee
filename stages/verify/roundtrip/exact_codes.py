"""Integer codes of 8 bits that are the source's: each must be the same code, whatever the rounding of its scale could hide.

In bfloat16 a scale may be off by a 256th of it, which is half a code of 128, and a zero point's product by as much again. So scales
and zero points are held against the source's by themselves, and values may be off by no more than these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.verify.matrices import Matrix, by_group
from stages.verify.roundtrip.bounds import SLACK, Allowance, half_step
from stages.verify.roundtrip.one_pass import one_pass
from stages.verify.rows import StoredRows

MIDDLE = 128  # of unsigned codes
# Of a product that is rounded once, or in float16 before it is made another type.
ONCE = 1 + 2.0**-3
TINY = 2.0**-12  # of a code: what float32 is off by


@dataclass(frozen=True)
class KeptScales:
    """How far the values of some rows may be off by their scales and zero points, as these are.

    `constant`: float32 [rows, groups]. `wrong`: bool [rows, groups], where scale or zero point are not the source's, rounded.
    `idle`: bool [rows, groups], where the scale is 0, so that codes say nothing. `scales`: float32 [rows, groups], the rank's.
    """

    constant: np.ndarray
    wrong: np.ndarray
    idle: np.ndarray
    scales: np.ndarray

    @property
    def right(self) -> bool:
        """Whether all are the source's, rounded."""
        return not self.wrong.any()

    @property
    def tell_codes(self) -> bool:
        """Whether a value with another code than the source's is farther off than its group's constant, in all groups."""
        return bool((self.idle | (2 * self.constant < np.abs(self.scales))).all())

    @property
    def allowance(self) -> Allowance:
        """The error of values whose codes are the source's."""
        return Allowance(0.0, self.constant)


def kept_scales(matrix: Matrix, rows: StoredRows, first: int, last: int, dtype: np.dtype) -> KeptScales | None:
    """Compare the scales and zero points of rows [first, last) with the source's; None where these are not codes of 8 bits alike.

    `dtype`: the model's.
    """
    if matrix.kind not in ("weight-only", "groupwise") or matrix.bits != 8 or rows.bits != 8 or rows.features != matrix.shape[1]:
        return None
    own, zeros = matrix.scales(first, last), matrix.zeros(first, last)
    if rows.scales is None or rows.zeros is None or rows.scales.shape[1] != own.shape[1]:
        return None
    slope, offset = half_step(dtype)
    theirs, middle = np.broadcast_to(rows.scales, own.shape), np.float32(MIDDLE) - rows.zeros
    meant, held = theirs * middle, np.zeros_like(own) if zeros is None else zeros
    of_scale, of_zero = np.abs(own - theirs), np.abs(held - meant)
    wrong = ~(of_scale <= np.abs(theirs) * np.float32(slope) + np.float32(offset))
    once = np.minimum(of_zero, np.abs(held - own * middle))  # of the scale as it is stored, or as the source has it
    wrong |= ~(once <= np.abs(meant) * np.float32(ONCE * slope) + np.float32(2 * offset))
    constant = (of_scale * np.float32(MIDDLE) + of_zero) * np.float32(SLACK) + np.abs(theirs) * np.float32(TINY) + np.float32(1e-38)
    return KeptScales(constant, wrong, own == 0, own)


def same_codes(matrix: Matrix, data: np.ndarray, base: int, first: int, rows: StoredRows) -> bool:
    """Whether the codes of a matrix are the source's for sure, as the kernels in C compare them; the arguments are `one_pass`'s."""
    factors = np.ones((1, 1), np.float32), np.full((len(rows.values), 1), MIDDLE, np.float32)
    half = Allowance(0.0, np.full((1, 1), 0.5, np.float32))
    return one_pass(matrix, data, base, first, StoredRows(rows.values, 8), half, 0.0, factors) is not None


def allowed_error(codes: np.ndarray, rows: StoredRows, held: KeptScales, actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """float32 [n, in_features]: the bound of each value, which one with another code, or of a wrong group, is beyond.

    `codes`: int8, the rank's. `rows`: the source's. `actual`, `expected`: float32, the numbers that they stand for.
    """
    bound = np.zeros(expected.shape, np.float32)
    by_group(np.add, bound, held.constant)
    bad = codes != (rows.values ^ np.uint8(MIDDLE)).view(np.int8)
    by_group(np.logical_and, bad, ~held.idle)
    by_group(np.logical_or, bad, held.wrong)
    bound[bad] = np.maximum(np.abs(actual[bad] - expected[bad]) / 2, np.float32(1e-38))
    return bound
