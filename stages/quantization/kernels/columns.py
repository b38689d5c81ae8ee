"""Sources that are packed along their columns, in NumPy; columns.c is the same in C.

Facts: docs/format/quantized-layouts.md, sections 5 and 6.
"""

from __future__ import annotations

import numpy as np

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of one of AWQ's words
_LOW = np.uint32(0x0F0F0F0F)


def transposed(words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint32 [n, m] of words of 32 bits [m, n]."""
    if out is None:
        return np.ascontiguousarray(words.T).view(np.uint32)
    out[...] = words.view(np.uint32).T
    return out


def awq_codes(words: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [8 * n, K / 2] of words [K, n]: codes of two in-features a byte. Words are taken apart two in-features at a time."""
    values = words.view(np.uint32)
    even, odd = values[0::2], values[1::2]
    low = (even & _LOW) | ((odd & _LOW) << 4)
    high = ((even >> 4) & _LOW) | (odd & ~_LOW)
    result = np.empty((8 * words.shape[1], even.shape[0]), dtype=np.uint8) if out is None else out
    # Byte b of `low` is nibble 2 b of the word, of `high` nibble 2 b + 1.
    for b in range(4):
        result[_COLUMNS[2 * b] :: 8] = low.view(np.uint8)[:, b::4].T
        result[_COLUMNS[2 * b + 1] :: 8] = high.view(np.uint8)[:, b::4].T
    return result
