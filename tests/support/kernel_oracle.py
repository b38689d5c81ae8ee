"""The kernels' weight layouts by their closed-form maps alone, one element at a time.

Facts: docs/format/quantized-layouts.md, section 3.
"""

from __future__ import annotations

from functools import cache

import numpy as np

TILE = 64
SHUFFLE = {8: (0, 2, 1, 3), 4: (0, 2, 4, 6, 1, 3, 5, 7)}
A, P, T = "A", "P", "T"


def source_row(d: int, bits: int) -> int:
    """The in-feature that row d of its group reads: src(d) for 16-bit activations."""
    groups = 128 // bits
    run, stride = 2, 8
    runs = groups // stride
    return (d // run % runs) * stride + d // run // runs * run + d % run


@cache
def gather(n_count: int, k_count: int, bits: int, layout: str) -> np.ndarray:
    """For each element of the flat buffer, the index n * K + k of the code that lies there."""
    if layout == T:
        return np.arange(n_count * k_count)  # X[n, k] alone
    group, columns = 128 // bits, 16 // bits if layout == A else 1
    stream = [0] * (n_count * k_count)
    for n in range(n_count):
        for k in range(k_count):
            if layout == A:
                e = n // columns * columns * k_count + k // TILE * columns * TILE + n % columns * TILE + k % TILE
            else:
                e = n * k_count + k
            stream[e] = n * k_count + k // group * group + source_row(k % group, bits)
    order = SHUFFLE[bits]
    word = len(order)
    return np.array([stream[f // word * word + order[f % word]] for f in range(len(stream))])


def arrange(codes: np.ndarray, bits: int, layout: str) -> bytes:
    """The bytes of a weight on disk: signed codes [N, K], gathered, biased but for T, int4 packed low nibble first."""
    flat = codes.reshape(-1)[gather(*codes.shape, bits, layout)].astype(np.int64)
    flat = flat % (1 << bits) if layout == T else flat + (1 << (bits - 1))
    if bits == 4:
        flat = flat[0::2] + 16 * flat[1::2]
    return flat.astype(np.uint8).tobytes()


def unarrange(data: bytes, shape: tuple[int, int], bits: int, layout: str) -> np.ndarray:
    """The signed codes [N, K] of a weight's bytes on disk."""
    flat = np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    if bits == 4:
        flat = np.stack([flat % 16, flat // 16], axis=1).reshape(-1)
    middle = 1 << (bits - 1)
    codes = np.empty(shape[0] * shape[1], dtype=np.int64)
    codes[gather(*shape, bits, layout)] = (flat ^ middle) - middle if layout == T else flat - middle
    return codes.reshape(shape)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes [N, K] as headrace hands them on: unsigned, uint8 [N, K * bits / 8], of even k in the low nibble."""
    unsigned = (codes.astype(np.int64) + (1 << (bits - 1))).astype(np.uint8)
    return unsigned if bits == 8 else unsigned[:, 0::2] + 16 * unsigned[:, 1::2]


# The order that each generation of GPUs reads matrices in, and stacks of experts (docs/format/runtime-1.2.md, sections d and d2).
ORDERS = {75: A, 80: A, 86: A, 87: A, 89: A, 90: P, 100: T, 103: T, 120: A, 121: A}
OF_STACKS = dict.fromkeys(ORDERS, A)


def order_of(sm: int, stacked: bool = False) -> str:
    """The order that a generation reads."""
    return (OF_STACKS if stacked else ORDERS)[sm]
