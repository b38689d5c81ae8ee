"""W8A16 and W4A16: int8 or int4 codes with a scale for each out-feature, from 16-bit weights, in the kernel's layout.

Facts: docs/format/quantized-layouts.md, section 4a. Weights are quantized as each rank holds them: a row-parallel linear has a
scale for each out-feature and each rank's share of the in-features (a segment).
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.tensor.metering import meter
from pipeline.tensor.noted import Notes, derive_noting
from pipeline.tensor.placement import Region, extent
from pipeline.tensor.tensors import Block, Parameter
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.kernels.layout import KernelLayout

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray


def pack(
    name: str, weight: BlockArray, layout: KernelLayout, segments: int, dtype: str, rows: int
) -> dict[str, tuple[BlockArray, Parameter]]:
    """`weight` and `per_channel_scale` of a 16-bit weight [out, in] or [experts, out, in], of the target's type `dtype`.

    `segments`: into how many equal parts the ranks split `in`. `rows`: out-features of a block of work.
    """
    *front, out, features = weight.shape
    bits, columns = layout.bits, layout.columns
    shape = (*front, out // columns, columns * features * bits // 8)
    chunks = (front and (1,) * front[0]) or row_chunks(out // columns, max(rows // columns, 1))
    arguments: dict[str, Any] = {"name": name, "segments": segments}
    notes = Notes(scales_of, weight.dtype, columns, segments)
    inputs, kind = {"weight": weight}, np.dtype(np.uint8)
    codes, scales = derive_noting(
        "quantize", quantized, notes, inputs, shape=shape, dtype=kind, rows=chunks, layout=layout, **arguments
    )
    of_codes, of_scales = _parameters(layout, features, segments, dtype)
    return {"weight": (codes, of_codes), "per_channel_scale": (scales, of_scales)}


@cache
def _parameters(layout: KernelLayout, features: int, segments: int, dtype: str) -> tuple[Parameter, Parameter]:
    """How codes and scales lie along the axes of modules with as many in-features: one object for all."""
    per_feature = Fraction(layout.bits, 8)
    codes = Parameter(
        axes=(("out", Fraction(1, layout.columns)), ("in", layout.columns * per_feature)),
        header=(("in", Fraction(1)), ("out", per_feature)),
        dtype="int8",
        working_bytes=12 * 8 // layout.bits,
    )
    scales = Parameter(
        axes=(("out", Fraction(1)), ("in", Fraction(segments, features))),
        header=(("out", Fraction(1)),),
        dtype=dtype,
        working_bytes=4 * features // segments,  # a scale takes all of its segment's weights
    )
    return codes, scales


def quantized(region: Region, weight: Block, layout: KernelLayout, name: str, segments: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the region quantized and arranged, uint8 [n / columns, columns * K * bits / 8]; and their scales, [n, segments]."""
    values, shape = _rows(region, weight, layout.columns)
    with meter("quantize", values.nbytes):
        codes, scales = kernels().weight_only_codes(values, layout, segments, name)
        *front, rows = shape
        of_rows = scales.astype(values.dtype).reshape(*front, rows * layout.columns, segments)
        return codes.reshape(*shape, -1)[..., slice(*region[-1])], of_rows


def scales_of(region: Region, weight: Block, layout: KernelLayout, name: str, segments: int) -> np.ndarray:
    """[n, segments] in the weight's own type."""
    values, shape = _rows((*region[:-1], (0, 1)), weight, 1)
    with meter("quantize", values.nbytes):
        scales = kernels().weight_only_scales(values, layout.bits, segments, name).astype(values.dtype)
        return np.asarray(scales.reshape(*shape, -1)[..., slice(*region[-1])])


def _rows(region: Region, weight: Block, columns: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The rows [n, K] that a region of the packed array stands for, and the shape of the region without its last axis."""
    *front, (first, last), _ = region
    values = np.ascontiguousarray(weight.read((*front, (first * columns, last * columns), (0, weight.shape[-1]))))
    return values.reshape(-1, weight.shape[-1]), extent(region)[:-1]


def row_chunks(length: int, rows: int) -> tuple[int, ...]:
    """The lengths of the blocks of `rows` rows that a matrix of `length` rows is cut into, the last with what is left."""
    full, rest = divmod(length, rows)
    return (rows,) * full + ((rest,) if rest else ())
