"""Small floats as float32, those of 4 bits and the powers of two by tables of all their values.

e4m3 is float8_e4m3fn; e2m1 has a sign, two bits of exponent and one of mantissa; e8m0 is a power of two.
Facts: docs/format/quantized-layouts.md, section 9c.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from stages.quantization.kernels.dispatch import kernels

_FLOAT8, _FLOAT32 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float32)
_BYTES = np.arange(256, dtype=np.uint8)
_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_E2M1 = np.concatenate([_HALF, -_HALF])
_E8M0 = np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan).astype(np.float32)
_PAIRS = np.stack([_E2M1[_BYTES & 15], _E2M1[_BYTES >> 4]], axis=1)


def e4m3(values: np.ndarray) -> np.ndarray:
    """float32 of float8_e4m3fn values, in their shape."""
    return kernels().cast(np.asarray(values).view(_FLOAT8), _FLOAT32)


def e8m0(values: np.ndarray) -> np.ndarray:
    """float32 of exponents with a bias of 127, uint8 or float8_e8m0fnu, in their shape. 255 is NaN."""
    return np.take(_E8M0, np.ascontiguousarray(values).view(np.uint8))


def e2m1(values: np.ndarray) -> np.ndarray:
    """float32 [n, 2 * m] of pairs of e2m1 uint8 [n, m], the first in the low half of a byte."""
    return np.take(_PAIRS, values, axis=0).reshape(len(values), -1)
