"""int8 and int4 with a scale for each share of a row, in NumPy; weight_only.c is the same in C.

Facts: docs/format/quantized-layouts.md, section 4a. What is said of arguments in dispatch.py holds here.
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import BadInput
from stages.quantization.finite import not_finite
from stages.quantization.kernels.layout import KernelLayout

# The largest number below a half: added before truncation it rounds halves away from zero, as C's round(), and nothing else up.
_HALF = np.float32(np.nextafter(np.float32(0.5), np.float32(0)))
_HALF_EXPONENT = np.float32(2.0**112)  # between the biases of float16's and float32's exponents
_CACHED = 1 << 17  # values on their way at once


def weight_only_codes(values: np.ndarray, layout: KernelLayout, segments: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n / columns, columns * K * bits / 8]: rows quantized and arranged; and their scales, float32 [n, segments]."""
    scales = weight_only_scales(values, layout.bits, segments, name)
    result = np.empty((len(values) // layout.columns, layout.columns * values.shape[1] * layout.bits // 8), dtype=np.uint8)
    # A few rows at a time: what they are on the way stays in the processor's cache.
    rows = max(_CACHED // values.shape[1] // layout.columns, 1) * layout.columns
    for start in range(0, len(values), rows):
        codes = quantize(values[start : start + rows], layout.bits, scales[start : start + rows])
        result[start // layout.columns : (start + rows) // layout.columns] = layout.arrange_codes(codes)
    return result, scales


def quantize(values: np.ndarray, bits: int, scales: np.ndarray) -> np.ndarray:
    """Unsigned codes uint16 [n, K] of 16-bit values with `scales` float32 [n, segments].

    Rounded to the nearest, halves away from zero, then clamped, in float32.

    Magnitudes are rounded, which is the same for both signs, and the sign is put back on integers: these are the fast halves of
    NumPy.
    """
    work = _magnitudes(values).reshape(*scales.shape, -1)
    work /= np.where(scales == 0, np.float32(1), scales)[:, :, None]  # rows of zeros have 0
    work += _HALF
    codes = work.astype(np.uint16).reshape(values.shape)
    middle = np.uint16(1 << (bits - 1))
    negative = values.view(np.uint16) >> 15
    np.minimum(codes, middle - 1 + negative, out=codes)
    codes ^= -negative
    codes += middle + negative
    return codes


def _magnitudes(values: np.ndarray) -> np.ndarray:
    """float32 of the magnitudes of finite 16-bit values: their bits moved into place, as casts of float16 are slow."""
    bits = (values.view(np.uint16) & np.uint16(0x7FFF)).astype(np.uint32)
    if values.dtype == np.float16:
        bits <<= 13
        return bits.view(np.float32) * _HALF_EXPONENT
    bits <<= 16
    return bits.view(np.float32)


def weight_only_scales(values: np.ndarray, bits: int, segments: int, name: str) -> np.ndarray:
    """float32 [n, segments]: the largest magnitude of each row's segment, divided by 2 ** (bits - 1); exact."""
    # Magnitudes of 16-bit floats order like the integers that their bits spell, and comparing those is fast.
    bits16 = values.view(np.uint16).reshape(len(values), segments, -1) & np.uint16(0x7FFF)
    largest = bits16.max(axis=2).view(values.dtype).astype(np.float32)
    if not np.all(np.isfinite(largest)):
        raise BadInput([not_finite(name)])
    return np.asarray(largest * np.float32(2.0 ** -(bits - 1)))
