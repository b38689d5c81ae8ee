"""Words that are packed along columns as rows of codes, in NumPy; words.c is the same in C."""

from __future__ import annotations

import numpy as np


def words_as_rows(words: np.ndarray, out: np.ndarray) -> None:
    """Words of 32 bits [m, n] as rows `out`, uint32 [n, m]."""
    out[...] = words.view(np.uint32).T


def columns_as_rows(words: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    """Words of 32 bits [m, n], m even, as rows `out`, uint8 [8 n, m / 2]: codes of two rows of words a byte, the first one low.

    `places`: uint8 [8], the nibble of a word that holds each of its eight columns.
    """
    columns = np.ascontiguousarray(words.T).view(np.uint32)
    even, odd = columns[:, 0::2], columns[:, 1::2]
    for column, place in enumerate(places):
        shift = np.uint32(4 * int(place))
        out[column::8] = (even >> shift & np.uint32(15)) | (odd >> shift & np.uint32(15)) << np.uint32(4)
