"""The orders that TensorRT-LLM's kernels read integer weights in, undone: by tables of this module's own.

Facts: docs/format/quantized-layouts.md, section 3.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from stages.verify.values import halves

TILE = 64  # in-features that stay together in the kernels' order
SHUFFLE = {
    8: (0, 2, 1, 3),
    4: (0, 2, 4, 6, 1, 3, 5, 7),
}  # bits -> for each place of a 32-bit word, the code of the stream that it holds


def interleaved(bits: int, order: str) -> int:
    """The out-features that an order interleaves."""
    return 16 // bits if order == "A" else 1


def unarrange(data: np.ndarray, features: int, bits: int, order: str) -> np.ndarray:
    """Undo an order: signed codes int8 [n * columns, features] of uint8 [n, columns * features * bits / 8]."""
    elements = data if bits == 8 else halves(data)
    if order == "T":
        # Two's complement, element by element where the transposed matrix has it.
        if bits == 4:
            elements ^= 8
            elements -= 8
        return elements.reshape(-1, features).view(np.int8)
    codes = elements.take(_places(bits, interleaved(bits, order), features), axis=1, mode="clip")
    codes -= np.uint8(1 << (bits - 1))  # the difference, as two's complement
    return codes.reshape(-1, features).view(np.int8)


@lru_cache(maxsize=2)
def run_places(bits: int) -> np.ndarray:
    """The place of each code in the run of 16 bytes that holds it, of the orders that mix them: uint8 [128 / bits].

    Of a row that is interleaved with others, runs follow one another within a tile as they do alone.
    """
    return _order(bits, 1)[: 128 // bits].astype(np.uint8)


@lru_cache(maxsize=8)
def _places(bits: int, columns: int, features: int) -> np.ndarray:
    """The place of each code (column, in-feature) in a stream of `columns` rows, int64 [columns * features]."""
    starts = np.arange(features // TILE) * columns * TILE
    return (_order(bits, columns).reshape(columns, 1, TILE) + starts[:, None]).reshape(-1)


def _order(bits: int, columns: int) -> np.ndarray:
    """The place of each code (column, in-feature) in its tile's stream, int64 [columns * TILE]: A and P, steps 1, 3 and 5."""
    group, word = 128 // bits, len(SHUFFLE[bits])
    halves, run, stride = group // 8, 2, 8
    place = [0] * (columns * TILE)
    shuffled = {code: at for at, code in enumerate(SHUFFLE[bits])}
    for column in range(columns):
        for d in range(TILE):
            inner = d % group
            source = d // group * group + (inner // run % halves) * stride + inner // run // halves * run + inner % run
            at = column * TILE + d
            place[column * TILE + source] = at // word * word + shuffled[at % word]
    return np.array(place, dtype=np.intp)
