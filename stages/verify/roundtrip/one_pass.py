"""Rows of a quantized matrix held against the source's in one pass, by the kernels in C, where they know the formats.

They confirm what is right: where a value is not right for sure, the caller computes in NumPy, and says which it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stages.verify.kernel_orders import TILE, interleaved, run_places
from stages.verify.kernels import checks
from stages.verify.matrices import Matrix
from stages.verify.roundtrip.bounds import Allowance
from stages.verify.rows import StoredRows

LANES = 16  # the most numbers that are computed with at once, on any processor: groups are so many, or a multiple
CHUNK = 2048  # in-features that are computed with at once, in which groups with a largest value of their own must end
_KINDS = {"weight-only": "integers", "groupwise": "integers", "awq": "pairs", "fp8": "float8", "fp8 rowwise": "float8"}
_NUMBERS = ("bfloat16", "float16", "float32", "float8_e4m3fn")


class Compared(NamedTuple):
    """Figures of values that are right: the greatest error, its worst part of what is allowed, and sums of squares."""

    greatest: float
    worst: float
    noise: float
    power: float
    square: float


def knows(matrix: Matrix) -> bool:
    """Whether the kernels are used, and know the format of a matrix."""
    return matrix.kind in _KINDS and not matrix.prequant_or_second and checks.in_c()


def one_pass(
    matrix: Matrix,
    data: np.ndarray,
    base: int,
    first: int,
    expected: StoredRows,
    bound: Allowance,
    worst: float,
    factors: tuple[np.ndarray, np.ndarray] | None = None,
) -> Compared | None:
    """Compare rows of a quantized matrix with the source's, in one pass.

    `data`: the units that hold them, uint8 [units, unit_bytes], the first of which begins with row `base`. `first`: the first row,
    which is held against the first of `expected`. `worst`: the worst part so far. `factors`: scales and zero points in the
    place of the matrix's own. Returns None where a value is not right for sure, and where the kernels do not know the formats.
    """
    features, last = matrix.shape[1], first + len(expected.values)
    type_ = f"codes{expected.bits}" if expected.bits else expected.values.dtype.name
    named = expected.bits in (4, 8) or type_ in _NUMBERS
    if not named or expected.features != features or not knows(matrix):
        return None
    kind = _KINDS[matrix.kind]
    scales, zeros = factors or (matrix.scales(first, last), matrix.zeros(first, last))
    of_groups = (scales, zeros, expected.scales, expected.zeros, bound.constant)
    grouped = any(each is not None and each.shape[1] > 1 and features // each.shape[1] % LANES for each in of_groups)
    own = bound.constant.shape[1] if bound.largest == "group" else 1  # groups with a largest value of their own
    if features % _run(matrix) or grouped or (own > 1 and CHUNK % (features // own)):
        return None
    columns = interleaved(matrix.bits, matrix.order) if kind == "integers" else 1
    found = checks.compared(
        kind,
        4 if kind == "pairs" else matrix.bits,
        columns,
        features,
        first - base,
        checks.contiguous(data),
        run_places(matrix.bits) if kind == "integers" and matrix.order != "T" else None,
        checks.contiguous(scales),
        None if zeros is None else checks.contiguous(zeros),
        type_,
        checks.rows_contiguous(expected.values),
        *(None if each is None else checks.contiguous(each) for each in (expected.scales, expected.zeros)),
        bound.base,
        bound.largest,
        bound.slope,
        bound.factor,
        bound.top,
        bound.slack,
        checks.contiguous(bound.constant),
        worst,
    )
    return None if found is None else Compared(*found)


def _run(matrix: Matrix) -> int:
    """The in-features that lie together in a matrix's order."""
    if matrix.kind not in ("weight-only", "groupwise"):
        return 1
    if matrix.order == "T":
        return 8 // matrix.bits
    return TILE if interleaved(matrix.bits, matrix.order) > 1 else 128 // matrix.bits
