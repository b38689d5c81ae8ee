"""The error that a format allows at each value: an element may be off by its format's rounding, and no more.

Facts: docs/format/quantized-layouts.md, sections 4 to 8. Every bound is a part of a value's magnitude, and a constant of its row or
group.
"""

from __future__ import annotations

import numpy as np

from stages.verify.matrices import Matrix, by_group
from stages.verify.values import Buffers

LARGEST_FLOAT8 = 448.0
HALF_STEPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
LEAST = 2.0**-24  # the step of float16 below its normal numbers
SLACK = 1.01  # for the rounding of the bounds themselves
# Half a step of float8 (e4m3): 3 bits of mantissa, and a smallest step of 2 ** -9 of the scale.
FLOAT8_STEP, FLOAT8_LEAST = 2.0**-4 * SLACK, 2.0**-10 * SLACK


def rounding(values: np.ndarray, dtype: np.dtype, times: int = 1, buffers: Buffers | None = None) -> np.ndarray:
    """Half a step of `dtype` at each value, so many times: float32, of the shape of `values`, which are float32."""
    slope, offset = _half_step(dtype)
    bound = _sloped(values, times * slope, buffers)
    bound += np.float32(times * offset)
    return bound


def allowed(
    matrix: Matrix,
    actual: np.ndarray,
    expected: np.ndarray,
    start: int,
    dtype: np.dtype,
    kept: bool,
    buffers: Buffers | None = None,
) -> np.ndarray:
    """The error that the format of a quantized matrix allows at each element.

    `actual`: float32 [n, in_features], rows [start, start + n) of `matrix`, as `Matrix.rows` has them. `expected`: the source's
    numbers for them. `dtype`: the model's. `kept`: the source's codes were kept, so that scales alone may have been rounded.
    `buffers`: to compute in. Returns float32 [n, in_features], greater than 0.
    """
    stop = start + len(expected)
    slope, offset = _half_step(dtype)
    if matrix.kind == "weight-only":
        return rounding(expected, dtype, 2, buffers) if kept else _by_rows(expected, matrix.bits, dtype, buffers)
    if matrix.kind == "awq":
        return rounding(expected, dtype, 3, buffers)
    if matrix.kind == "groupwise":
        if kept:
            return _kept_codes(matrix, actual, start, dtype, buffers)
        # Half a step of codes from -8 to 7 (or of 8 bits) that reach the group's largest value; scales are rounded.
        bound = _sloped(expected, 4 * slope, buffers)
        groups = matrix.tensors["weights_scaling_factor"].shape[-2]
        largest = bound.reshape(len(bound), groups, -1).max(axis=2) / np.float32(4 * slope)
        by_group(np.add, bound, largest * np.float32(0.55 / (2 ** (matrix.bits - 1) - 1)) + np.float32(4 * offset))
        return bound
    if kept and not (matrix.fused and matrix.kind in ("fp8", "nvfp4")):
        return rounding(expected, np.dtype(np.float32), 4, buffers)  # one scale and the source's codes
    if kept:
        # The parts of a fused module, which were brought to the largest of their scales.
        bound = _sloped(expected, FLOAT8_STEP, buffers)
        by_group(np.add, bound, np.abs(matrix.scales(start, stop)) * np.float32(FLOAT8_LEAST) + np.float32(1e-38))
        return bound
    bound = _sloped(expected, FLOAT8_STEP + 2 * slope, buffers)
    bound += _largest(expected) * np.float32(FLOAT8_LEAST / LARGEST_FLOAT8) + np.float32(2 * offset)
    return bound


def _half_step(dtype: np.dtype) -> tuple[float, float]:
    """Half a step of a type, as a part of a value's magnitude and a constant."""
    return HALF_STEPS[dtype.name] * SLACK, LEAST if dtype.name == "float16" else 1e-38


def _sloped(values: np.ndarray, slope: float, buffers: Buffers | None) -> np.ndarray:
    """|values| * slope, in a buffer."""
    out = (buffers or Buffers()).array("allowed", values.shape)
    np.abs(values, out=out)
    out *= np.float32(slope)
    return out


def _largest(values: np.ndarray) -> np.ndarray:
    """The largest magnitude of each row, float32 [rows, 1]."""
    result: np.ndarray = np.maximum(values.max(axis=1, keepdims=True), -values.min(axis=1, keepdims=True))
    return result


def _by_rows(expected: np.ndarray, bits: int, dtype: np.dtype, buffers: Buffers | None) -> np.ndarray:
    """Weight-only: half a step of each row's scale, which is rounded; the largest value of a row has no code of its own."""
    slope, offset = _half_step(dtype)
    step = _largest(expected) * np.float32(2.0 ** (1 - bits))
    bound = _sloped(expected, 3 * slope, buffers)
    bound += step * np.float32(0.5 * SLACK) + np.float32(3 * offset)
    top = step * np.float32(2 ** (bits - 1) - 1)
    row, column = np.divmod(np.flatnonzero(expected > top), expected.shape[1])  # few
    bound[row, column] += (expected[row, column] - top[row, 0]) * np.float32(SLACK)
    return bound


def _kept_codes(matrix: Matrix, actual: np.ndarray, start: int, dtype: np.dtype, buffers: Buffers | None) -> np.ndarray:
    """Groupwise with the source's codes: scales and zero points are rounded, the zero point's product twice."""
    slope, offset = _half_step(dtype)
    zeros = matrix.zeros(start, start + len(actual))
    if zeros is None:
        bound = rounding(actual, dtype, 2, buffers)
        bound += np.float32(3 * offset)
        return bound
    bound = (buffers or Buffers()).array("allowed", actual.shape)
    np.copyto(bound, actual)
    by_group(np.subtract, bound, zeros)  # the product of code and scale
    np.abs(bound, out=bound)
    bound *= np.float32(2 * slope)
    by_group(np.add, bound, np.abs(zeros) * np.float32(3 * slope) + np.float32(5 * offset))
    return bound
