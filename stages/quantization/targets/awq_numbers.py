"""W4A16_AWQ of numbers: 4-bit codes by groups of in-features, which scales of a calibration have multiplied beforehand.

Activations are multiplied by the inverse of the scales (`prequant_scaling_factor`, in the model's type), and weights divided by
it, as it is stored: so that nothing has to be folded into other modules. The step of a group is rounded to the model's type, in
which kernels have it, before codes are made with it. In ModelOpt's portable form, which the builder arranges.
Facts: docs/format/quantized-layouts.md, sections 1 and 7.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadInput
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.noted import Notes, derive_noting
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, Parameter
from stages.quantization.finite import not_finite
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.targets.weight_only import row_chunks

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

ONE = Fraction(1)
FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
HIGHEST, LOWEST = 7, -8  # of the codes
WORKING_BYTES = 40  # of a packed byte on its way: two numbers, as the source has them, as float32 twice, and as codes


def pack(
    name: str, weight: BlockArray, scale: BlockArray, group_size: int, dtype: np.dtype, rows: int
) -> dict[str, tuple[BlockArray, Parameter]]:
    """`weight`, `weights_scaling_factor` and `prequant_scaling_factor` of a weight [out, in].

    `name`: the weight's in the source, for what is wrong with its values. `scale`: float32 [in]. `dtype`: the model's type. `rows`:
    out-features of a block of work.
    """
    out, features = weight.shape
    groups = features // group_size
    notes = Notes(steps_of, FLOAT32, 2, groups)
    codes, steps = derive_noting(
        "quantize",
        codes_of,
        notes,
        {"weight": weight, "scale": scale},
        shape=(out // 2, features),
        dtype=INT8,
        rows=row_chunks(out // 2, max(rows // 2, 1)),
        size=group_size,
        to=dtype,
        name=name,
    )
    inverse = derive("quantize", inverse_of, {"scale": scale}, shape=(features,), dtype=dtype, to=dtype)
    by_group = Parameter((("out", ONE), ("group", Fraction(groups, features))), working_bytes=20 * group_size)
    return {
        "weight": (codes, Parameter((("out", Fraction(1, 2)), ("in", ONE)), working_bytes=WORKING_BYTES)),
        "weights_scaling_factor": (steps, by_group),
        "prequant_scaling_factor": (inverse, Parameter((("in", ONE),))),
    }


def codes_of(region: Region, weight: Block, scale: Block, size: int, to: np.dtype, name: str) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, K] of the region: codes of out-features 2 i (low nibble) and 2 i + 1; and their steps, float32 [2 n, K / size].

    Raises BadInput naming the weight where a value is not finite, or too large for a step that is.
    """
    (first, last), columns = region
    values = _scaled(weight, ((2 * first, 2 * last), (0, weight.shape[1])), scale, to)
    with meter("quantize", values.nbytes):
        groups = values.reshape(len(values), -1, size)
        steps = _steps(groups, to, name)
        groups /= np.where(steps == 0, np.float32(1), steps)[:, :, None]
        np.rint(groups, out=groups)
        np.clip(groups, LOWEST, HIGHEST, out=groups)
        codes = values.astype(INT8).view(np.uint8)
        packed = codes[0::2] & np.uint8(15)
        packed |= codes[1::2] << np.uint8(4)
        return packed.view(INT8)[:, slice(*columns)], steps


def steps_of(region: Region, weight: Block, scale: Block, size: int, to: np.dtype, name: str) -> np.ndarray:
    """float32 of the region of [N, K / size]."""
    rows, (left, right) = region
    values = _scaled(weight, (rows, (left * size, right * size)), scale, to)
    with meter("quantize", values.nbytes):
        return _steps(values.reshape(len(values), -1, size), to, name)


def inverse_of(region: Region, scale: Block, to: np.dtype) -> np.ndarray:
    """The region of what activations are multiplied by, in the type `to`."""
    return kernels().cast(np.float32(1) / np.asarray(scale.read(region), dtype=FLOAT32), to)


def _scaled(weight: Block, region: Region, scale: Block, to: np.dtype) -> np.ndarray:
    """float32 of a region of the weight, divided by the inverse of its in-features' scales as it is stored."""
    divisor = kernels().cast(inverse_of(region[1:], scale, to), FLOAT32)
    stored = np.asarray(weight.read(region))
    with meter("quantize", stored.nbytes), np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(kernels().cast(stored, FLOAT32) / divisor)


def _steps(groups: np.ndarray, to: np.dtype, name: str) -> np.ndarray:
    """float32 [n, groups]: the step with which the codes hold the largest magnitude of [n, groups, size], of whichever sign."""
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.maximum(groups.max(axis=2) / np.float32(HIGHEST), groups.min(axis=2) / np.float32(LOWEST))
        steps += np.float32(0)  # of two zeros NumPy takes the one or the other, as its vectors have it: the sum is +0 for both
        steps = kernels().cast(kernels().cast(steps, to), FLOAT32)
    if not np.isfinite(steps).all():
        raise BadInput([not_finite(name)])
    return np.asarray(steps)
