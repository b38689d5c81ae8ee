"""SmoothQuant's passes over float16 weights, in NumPy; smoothed.c is the same in C.

Facts: docs/format/quantized-layouts.md, section 4d. What is said of arguments in dispatch.py holds here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from stages.quantization.kernels.casts import cast

Product = Literal["half", "float", "divided"]  # how weights and scales are multiplied
FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
MAGNITUDE = np.uint16(0x7FFF)  # the bits of a float16 without its sign
LARGEST = np.float32(127)


def column_magnitudes(values: np.ndarray) -> np.ndarray:
    """uint16 [K]."""
    return np.asarray(_bits(values).max(axis=0, initial=0))


def smoothed(values: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 [n, K], and uint16 [n]: products in float64, rounded to float32 and from there to float16, as torch converts."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = cast((cast(values, FLOAT32) * factors).astype(FLOAT32), FLOAT16)
    return result, _bits(result).max(axis=1, initial=0)


def smoothed_magnitudes(values: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint16 [n]."""
    return smoothed(values, factors)[1]


def smoothed_codes(values: np.ndarray, scales: np.ndarray, product: Product, out: np.ndarray | None = None) -> np.ndarray:
    """int8 [n, K], to the nearest even."""
    wide, by_row = cast(values, FLOAT32), scales[:, None]
    np.divide(wide, by_row, out=wide) if product == "divided" else np.multiply(wide, by_row, out=wide)
    if product != "float":
        wide = cast(cast(wide, FLOAT16), FLOAT32)
    np.clip(np.rint(wide, out=wide), -LARGEST, LARGEST, out=wide)
    if out is None:
        return wide.astype(np.int8)
    out[...] = wide
    return out


def _bits(values: np.ndarray) -> np.ndarray:
    """uint16: magnitudes of float16 values as their bits, which are in the same order."""
    return values.view(np.uint16) & MAGNITUDE
