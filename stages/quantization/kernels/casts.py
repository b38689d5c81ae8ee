"""Each value in another type, rounded to nearest even, in NumPy; casts.c is the same in C for the types of weights.

A NaN stays one with its sign. Of its spare bits, those of float16 become float32's highest, and all are as one conversion has them
where the result has 16 bits: else they would depend on the processor, as NumPy's do.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

FLOAT8, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float16), np.dtype(np.float32)
# The bits of infinity, and of the NaN that is written, less the sign.
_SPECIAL = {FLOAT16: (0x7C00, 0x7E00), np.dtype(ml_dtypes.bfloat16): (0x7F80, 0x7FC0)}
# By a table of all its values float8 is read five times as fast as by its own conversion.
_OF_FLOAT8 = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def cast(values: np.ndarray, to: np.dtype) -> np.ndarray:
    """Values in another type; too large for it becomes infinity, as in torch.

    A double becomes a number of 16 bits by way of float32, rounded twice, as in torch too: NumPy's own cast to float16 rounds once.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == FLOAT8 and to != FLOAT8:
            values = np.asarray(np.take(_OF_FLOAT8, values.view(np.uint8)))
            if to == FLOAT32:
                return values
        if values.dtype == np.float64 and to in _SPECIAL:
            values = values.astype(np.float32)
        result = np.asarray(values.astype(to))
    if to in _SPECIAL and values.dtype != to:
        infinity, nan = _SPECIAL[to]
        bits = result.view(np.uint16)
        missing = (bits & 0x7FFF) > infinity
        bits[missing] = bits[missing] & 0x8000 | nan
    elif values.dtype == FLOAT16 and to == FLOAT32:
        bits = values.view(np.uint16)
        missing = (bits & 0x7FFF) > 0x7C00
        kept = bits[missing].astype(np.uint32)
        result.view(np.uint32)[missing] = (kept & 0x8000) << 16 | 0x7F800000 | (kept & 0x03FF) << 13
    return result
