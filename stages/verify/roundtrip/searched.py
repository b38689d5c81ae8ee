"""4-bit codes by groups of numbers whose in-features were multiplied beforehand (AWQ): the error that the format allows.

Facts: docs/format/quantized-layouts.md, section 7.
"""

from __future__ import annotations

import numpy as np

from stages.verify.matrices import by_group

HALF_STEP = 0.55 / 7  # of a code, as a part of the group's largest value; steps are rounded to 16 bits
LEAST = 8 * 2.0**-24  # codes by what steps of float16 below its normal numbers are off


def allowed_error(expected: np.ndarray, factors: np.ndarray, groups: int) -> np.ndarray:
    """float32 [n, in_features]: how far a rank's numbers, times `factors` [in_features], may be from those of the source.

    `expected`: float32 [n, in_features], the source's. `groups`: of a row. The step is that of the group's largest value, by the
    source and not by the rank's own scales.
    """
    scaled: np.ndarray = np.abs(expected)
    scaled /= factors
    largest = scaled.reshape(len(scaled), groups, -1).max(axis=2)
    scaled[...] = factors
    by_group(np.multiply, scaled, largest * np.float32(HALF_STEP) + np.float32(LEAST))
    return scaled
