"""The error that a format allows at each value: an element may be off by its format's rounding, and no more.

Facts: docs/format/quantized-layouts.md, sections 4 to 8. Every bound is a part of a value's magnitude, and a constant of its row or
group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.verify.matrices import Matrix, by_group
from stages.verify.values import Buffers

LARGEST_FLOAT8, LARGEST_FLOAT4 = 448.0, 6.0
HALF_STEPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
LEAST = 2.0**-24  # the step of float16 below its normal numbers
SLACK = 1.01  # for the rounding of the bounds themselves
# Half a step of float8 (e4m3): 3 bits of mantissa, and a smallest step of 2 ** -9 of the scale.
FLOAT8_STEP, FLOAT8_LEAST = 2.0**-4 * SLACK, 2.0**-10 * SLACK


@dataclass(frozen=True)
class Allowance:
    """|error| <= slope * |base| + constant + factor * largest, of some rows of a matrix; computed in float32.

    `base`: the "expected" value, the "actual" one, or the "product" of its code and scale, which is the actual one less its zero
    point. `constant`: float32 [1 or rows, groups], greater than 0. `largest`: the magnitude of the expected values of a "row" or of
    a "group" of `constant` that is the largest; "" where nothing depends on it. Values above `top` times it may be off by their
    distance from there, too, times `slack`; 0 for none.
    """

    slope: float
    constant: np.ndarray
    base: str = "expected"
    largest: str = ""
    factor: float = 0.0
    top: float = 0.0
    slack: float = SLACK

    def of(
        self, actual: np.ndarray, expected: np.ndarray, zeros: np.ndarray | None = None, buffers: Buffers | None = None
    ) -> np.ndarray:
        """The bound at each element, float32 of the shape of `expected`.

        `actual`, `expected`: float32 [rows, in_features]. `zeros`: float32 [rows, groups], of the base "product". `buffers`: to
        compute in.
        """
        bound = (buffers or Buffers()).array("allowed", expected.shape)
        if self.base == "product" and zeros is not None:
            np.copyto(bound, actual)
            by_group(np.subtract, bound, zeros)
            np.abs(bound, out=bound)
        else:
            np.abs(expected if self.base == "expected" else actual, out=bound)
        constant = self.constant
        if self.largest:
            groups = constant.shape[1] if self.largest == "group" else 1
            grouped = expected.reshape(len(expected), groups, -1)
            largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
            constant = largest * np.float32(self.factor) + constant
        bound *= np.float32(self.slope)
        by_group(np.add, bound, constant)
        if self.top:
            top = largest * np.float32(self.top)
            row, column = np.divmod(np.flatnonzero(expected > top), expected.shape[1])  # few
            bound[row, column] += (expected[row, column] - top[row, 0]) * np.float32(self.slack)
        return bound


def rounding(values: np.ndarray, dtype: np.dtype, times: int = 1, buffers: Buffers | None = None) -> np.ndarray:
    """Half a step of `dtype` at each value, so many times: float32, of the shape of `values`, which are float32."""
    slope, offset = half_step(dtype)
    bound = (buffers or Buffers()).array("allowed", values.shape)
    np.abs(values, out=bound)
    bound *= np.float32(times * slope)
    bound += np.float32(times * offset)
    return bound


class OfSource(NamedTuple):
    """The scales of a weight's float8 or 4-bit float codes in the source.

    `own`: the weight's. `common`: the largest of those of all weights that are in one module of the rank, which have it in common.
    """

    own: float
    common: float


def allowed(matrix: Matrix, start: int, stop: int, dtype: np.dtype, kept: bool, source: OfSource | None = None) -> Allowance:
    """The error that the format of a quantized matrix allows at each element of rows [start, stop).

    `dtype`: the model's. `kept`: the source's codes were kept, so that scales alone may have been rounded. `source`: the scales of
    codes that are floats; None where the source has numbers or other codes.
    """
    slope, offset = half_step(dtype)
    if matrix.kind == "weight-only":
        return Allowance(2 * slope, _one(2 * offset)) if kept else _by_rows(matrix.bits, dtype)
    if matrix.kind == "smoothquant":  # the source's codes and scales; others are not compared here (smoothed.py)
        slope, offset = half_step(np.dtype(np.float32))
        return Allowance(4 * slope, _one(4 * offset))
    if matrix.kind == "awq":
        return Allowance(3 * slope, _one(3 * offset))
    if matrix.kind == "groupwise":
        if kept:
            return kept_codes(matrix.zeros(start, stop), dtype)
        # Half a step of codes from -8 to 7 (or of 8 bits) that reach the group's largest value; scales are rounded.
        groups = matrix.tensors["weights_scaling_factor"].shape[-2]
        constant = np.full((1, groups), 4 * offset, np.float32)
        return Allowance(4 * slope, constant, largest="group", factor=0.55 / (2 ** (matrix.bits - 1) - 1))
    if kept and matrix.fused and source and source.own != source.common:
        # Brought to the largest scale of the module's parts: each code, or (of 4-bit floats) the scale of each group of codes.
        step = source.common * (LARGEST_FLOAT4 if matrix.kind == "nvfp4" else 1)
        return Allowance(FLOAT8_STEP, _one(step * FLOAT8_LEAST + 1e-38))
    if kept:
        slope, offset = half_step(np.dtype(np.float32))
        return Allowance(4 * slope, _one(4 * offset))  # one scale and the source's codes
    if matrix.kind == "fp8":  # one scale for all rows, whose largest value has the largest code: reached.py
        step = float(np.abs(matrix.scales(start, stop)).max())
        if source:  # no value is larger than the largest code by its scale
            step = min(step, source.common * LARGEST_FLOAT4)
        return Allowance(FLOAT8_STEP + 2 * slope, _one(step * FLOAT8_LEAST + 2 * offset))
    return Allowance(FLOAT8_STEP + 2 * slope, _one(2 * offset), largest="row", factor=FLOAT8_LEAST / LARGEST_FLOAT8)


def half_step(dtype: np.dtype) -> tuple[float, float]:
    """Half a step of a type, as a part of a value's magnitude and a constant."""
    return HALF_STEPS[dtype.name] * SLACK, LEAST if dtype.name == "float16" else 1e-38


def _one(value: float) -> np.ndarray:
    return np.full((1, 1), value, np.float32)


def _by_rows(bits: int, dtype: np.dtype) -> Allowance:
    """Weight-only: half a step of each row's scale, which is rounded; the largest value of a row has no code of its own."""
    slope, offset = half_step(dtype)
    step = 2.0 ** (1 - bits)  # of the largest value
    return Allowance(3 * slope, _one(3 * offset), largest="row", factor=step * 0.5 * SLACK, top=step * (2 ** (bits - 1) - 1))


def kept_codes(zeros: np.ndarray | None, dtype: np.dtype) -> Allowance:
    """Groupwise with the source's codes: scales and zero points are rounded, the zero point's product twice.

    `zeros`: float32, of the groups of some rows; the constant is of their shape.
    """
    slope, offset = half_step(dtype)
    if zeros is None:
        return Allowance(2 * slope, _one(5 * offset), "actual")
    return Allowance(2 * slope, np.abs(zeros) * np.float32(3 * slope) + np.float32(5 * offset), "product")
