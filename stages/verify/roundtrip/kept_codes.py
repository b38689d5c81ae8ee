"""A groupwise matrix whose codes are the source's, held against these as the source packs them: along columns, by the kernels in C.

They confirm what is right, as in one_pass.py.
"""

from __future__ import annotations

import numpy as np

from stages.verify.column_words import ColumnWords
from stages.verify.kernel_orders import interleaved, run_places
from stages.verify.kernels import checks
from stages.verify.matrices import Matrix
from stages.verify.roundtrip.bounds import kept_codes
from stages.verify.roundtrip.one_pass import Compared

RUN = 32  # in-features that are computed with at once: groups are so many, or a multiple


def knows_columns(matrix: Matrix) -> bool:
    """Whether the kernels are used, and know the format of a matrix."""
    if matrix.kind != "groupwise" or matrix.bits != 4 or matrix.prequant_or_second:
        return False
    return not matrix.shape[1] % (RUN * matrix.tensors["weights_scaling_factor"].shape[-2]) and checks.in_c()


def compare_columns(
    matrix: Matrix, data: np.ndarray, base: int, first: int, expected: ColumnWords, dtype: np.dtype, worst: float
) -> Compared | None:
    """Compare rows of a matrix that the kernels know with the source's, from row `first` on.

    `data`: the units that hold them, uint8 [units, unit_bytes], the first of which begins with row `base`. `dtype`: the model's.
    `worst`: the worst part so far. Returns None where a value is not right for sure, and where the source's groups are of other
    sizes than the kernels know.
    """
    features, last = matrix.shape[1], first + expected.scales.shape[1]
    scales = matrix.by_group("weights_scaling_factor", first, last)
    zeros = matrix.by_group("zero", first, last) if "zero" in matrix.tensors else None
    bound = kept_codes(zeros, dtype)
    constant = np.broadcast_to(bound.constant, scales.shape)
    if features % (RUN * len(expected.scales)):
        return None
    places = run_places(4) if matrix.order != "T" else None
    common = (interleaved(4, matrix.order), features, first - base, checks.contiguous(data), places)
    factors = [checks.contiguous(each) for each in (scales, expected.scales, expected.zeros, constant)]
    own_zeros = None if zeros is None else checks.contiguous(zeros)
    greatest, sums = 0.0, np.zeros(3)
    for start, words in expected.windows():
        found = checks.kept(
            *common,
            checks.rows_contiguous(words),
            expected.order,
            start,
            expected.skip,
            factors[0],
            own_zeros,
            *factors[1:],
            bound.slope,
            worst,
        )
        if found is None:
            return None
        greatest, worst = max(greatest, found[0]), found[1]
        sums += found[2:]
    return Compared(greatest, worst, *sums.tolist())
