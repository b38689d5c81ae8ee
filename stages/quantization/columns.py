"""Sources whose codes are packed along their columns, as rows: words are taken out of the file some rows at a time.

A few columns of many rows are then views of the file, which need not be copied together first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.tensor.metering import meter
from pipeline.tensor.tensors import Block
from stages.quantization.kernels.dispatch import kernels

WINDOW_BYTES = 1 << 20  # of words at once
STEP = 128  # rows of words, of which all windows but the last have a multiple


def rows_of_words(words: Block, columns: tuple[int, int]) -> np.ndarray:
    """uint32 [n, m]: n of the columns of words int32 [m, N]."""
    result = np.empty((columns[1] - columns[0], words.shape[0]), dtype=np.uint32)
    for start, stop, values in _windows(words, columns):
        kernels().transposed(values, result[:, start:stop])
    return result


def rows_of_awq(words: Block, columns: tuple[int, int]) -> np.ndarray:
    """uint8 [8 n, K / 2]: the codes of n of the columns of AWQ's words int32 [K, N]; K is even."""
    result = np.empty((8 * (columns[1] - columns[0]), words.shape[0] // 2), dtype=np.uint8)
    for start, stop, values in _windows(words, columns):
        kernels().awq_codes(values, result[:, start // 2 : stop // 2])
    return result


def _windows(words: Block, columns: tuple[int, int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Some rows of the columns at a time: the first row, the one behind the last, and the words. Working with them is unpacking."""
    row_bytes = (columns[1] - columns[0]) * words.dtype.itemsize
    step = max(WINDOW_BYTES // max(row_bytes, 1) // STEP, 1) * STEP
    for start in range(0, words.shape[0], step):
        stop = min(start + step, words.shape[0])
        values = words.read(((start, stop), columns))
        with meter("unpack", values.nbytes):
            yield start, stop, values
