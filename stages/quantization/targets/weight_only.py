"""W8A16 and W4A16: int8 or int4 codes with a scale for each out-feature, from 16-bit weights, in the kernel's layout.

Facts: docs/format/quantized-layouts.md, section 4a. Weights are quantized as each rank holds them: a row-parallel linear has a
scale for each out-feature and each rank's share of the in-features (a segment).
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent
from pipeline.tensor.tensors import Block, Parameter
from stages.quantization.kernels.layout import KernelLayout

# The largest number below a half: added before truncation it rounds halves away from zero, as C's round(), and nothing else up.
_HALF = np.float32(np.nextafter(np.float32(0.5), np.float32(0)))
_HALF_EXPONENT = np.float32(2.0**112)  # between the biases of float16's and float32's exponents
_CACHED = 1 << 17  # values on their way at once


def pack(
    name: str, weight: BlockArray, layout: KernelLayout, segments: int, dtype: str, rows: int
) -> dict[str, tuple[BlockArray, Parameter]]:
    """`weight` and `per_channel_scale` of a 16-bit weight [out, in] or [experts, out, in], of the target's type `dtype`.

    `segments`: into how many equal parts the ranks split `in`. `rows`: out-features of a block of work.
    """
    *front, out, features = weight.shape
    bits, columns = layout.bits, layout.columns
    shape = (*front, out // columns, columns * features * bits // 8)
    chunks = (front and (1,) * front[0]) or _chunks(out // columns, max(rows // columns, 1))
    arguments: dict[str, Any] = {"name": name, "segments": segments}
    codes = derive(
        "quantize", codes_of, {"weight": weight}, shape=shape, dtype=np.dtype(np.uint8), rows=chunks, layout=layout, **arguments
    )
    scales = derive(
        "quantize", scales_of, {"weight": weight}, shape=(*front, out, segments), dtype=weight.dtype, bits=bits, **arguments
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


def codes_of(region: Region, weight: Block, layout: KernelLayout, name: str, segments: int) -> np.ndarray:
    """uint8 [n / columns, columns * K * bits / 8]: the rows of the region quantized and arranged."""
    values, shape = _rows(region, weight, layout.columns)
    with meter("quantize", values.nbytes):
        result = np.empty((len(values) // layout.columns, layout.columns * values.shape[1] * layout.bits // 8), dtype=np.uint8)
        # A few rows at a time: what they are on the way stays in the processor's cache.
        rows = max(_CACHED // values.shape[1] // layout.columns, 1) * layout.columns
        for start in range(0, len(values), rows):
            codes = quantize(values[start : start + rows], layout.bits, segments, name)
            result[start // layout.columns : (start + rows) // layout.columns] = layout.arrange_codes(codes)
        return result.reshape(*shape, -1)[..., slice(*region[-1])]


def scales_of(region: Region, weight: Block, bits: int, name: str, segments: int) -> np.ndarray:
    """[n, segments] in the weight's own type."""
    values, shape = _rows((*region[:-1], (0, 1)), weight, 1)
    with meter("quantize", values.nbytes):
        scales = row_scales(values, bits, segments, name).astype(values.dtype)
        return np.asarray(scales.reshape(*shape, -1)[..., slice(*region[-1])])


def quantize(values: np.ndarray, bits: int, segments: int, name: str) -> np.ndarray:
    """Unsigned codes uint16 [n, K] of 16-bit values: rounded to the nearest, halves away from zero, then clamped, in float32.

    Magnitudes are rounded, which is the same for both signs, and the sign is put back on integers: these are the fast halves of
    NumPy.
    """
    scales = row_scales(values, bits, segments, name)
    scales[scales == 0] = 1  # rows of zeros
    work = _magnitudes(values).reshape(len(values), segments, -1)
    work /= scales[:, :, None]
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


def row_scales(values: np.ndarray, bits: int, segments: int, name: str) -> np.ndarray:
    """float32 [n, segments]: the largest magnitude of each row's segment, divided by 2 ** (bits - 1); exact.

    Raises BadInput naming the tensor where a value is not finite.
    """
    # Magnitudes of 16-bit floats order like the integers that their bits spell, and comparing those is fast.
    bits16 = values.view(np.uint16).reshape(len(values), segments, -1) & np.uint16(0x7FFF)
    largest = bits16.max(axis=2).view(values.dtype).astype(np.float32)
    if not np.all(np.isfinite(largest)):
        raise BadInput([not_finite(name)])
    return np.asarray(largest * np.float32(2.0 ** -(bits - 1)))


def not_finite(name: str) -> Problem:
    """The problem of a weight that holds NaN or infinities: no scale fits it."""
    return Problem(
        name, "a value that is not finite (NaN or infinity)", "finite weights, as no scale fits it", "Mend the checkpoint"
    )


def _rows(region: Region, weight: Block, columns: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The rows [n, K] that a region of the packed array stands for, and the shape of the region without its last axis."""
    *front, (first, last), _ = region
    values = np.ascontiguousarray(weight.read((*front, (first * columns, last * columns), (0, weight.shape[-1]))))
    return values.reshape(-1, weight.shape[-1]), extent(region)[:-1]


def _chunks(length: int, rows: int) -> tuple[int, ...]:
    full, rest = divmod(length, rows)
    return (rows,) * full + ((rest,) if rest else ())
