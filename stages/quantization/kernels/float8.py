"""float8 with a scale for each share of a row, and codes of one scale as codes of another, in NumPy; float8.c is the same in C.

Facts: docs/format/quantized-layouts.md, sections 4b and 4c. What is said of arguments in dispatch.py holds here.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pipeline.errors import BadInput
from stages.quantization.finite import not_finite
from stages.quantization.kernels.casts import cast

FLOAT32, FLOAT8 = np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448)  # of float8_e4m3fn
_LEAST_SCALE = np.float32(1 / (448 * 512))


def float8_scales(values: np.ndarray, segments: int, clamp: float, name: str) -> np.ndarray:
    """float32 [n, segments]."""
    return _clamped(values, segments, clamp, name)[1]


def float8_codes(values: np.ndarray, segments: int, clamp: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """float8_e4m3fn [n, K], and float32 [n, segments]."""
    clamped, scales = _clamped(values, segments, clamp, name)
    np.clip(np.divide(clamped, scales[:, :, None], out=clamped), -LARGEST, LARGEST, out=clamped)
    return clamped.astype(FLOAT8).reshape(values.shape), scales


def float8_rescaled(codes: np.ndarray, scale: np.float32, common: np.float32) -> np.ndarray:
    """float8_e4m3fn: multiplied, divided, then rounded once."""
    wide = cast(codes, FLOAT32)
    wide *= scale
    wide /= common
    return wide.astype(FLOAT8)


def _clamped(values: np.ndarray, segments: int, clamp: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, K] clamped, as float32 [n, segments, K / segments], and the scale of each segment."""
    wide = values.astype(np.float32).reshape(len(values), segments, -1)
    largest = np.maximum(wide.max(axis=2), -wide.min(axis=2))
    if not np.all(np.isfinite(largest)):
        raise BadInput([not_finite(name)])
    np.clip(wide, np.float32(-clamp), np.float32(clamp), out=wide)
    return wide, np.maximum(np.minimum(largest, np.float32(clamp)) / LARGEST, _LEAST_SCALE)
