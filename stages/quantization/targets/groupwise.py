"""W4A16_GPTQ, W8A16_GPTQ and W4A16_AWQ: integer codes with scales by groups of in-features, as they come from GPTQ, AWQ and their
like.

Facts: docs/format/quantized-layouts.md, sections 5 to 7. GPTQ's weights are in the kernel's layout and pass for the model's type;
AWQ's are in ModelOpt's portable form, which the builder arranges: int8 [N / 2, K], scales float32 [N, K / g].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, Parameter
from stages.quantization.finite import finite
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.targets.weight_only import _rows, row_chunks

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

ONE = Fraction(1)
INT8, UINT8, FLOAT32 = np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.float32)


def pack_gptq(
    parameters: Mapping[str, BlockArray],
    layout: KernelLayout,
    dtype: np.dtype,
    name: str,
    rows: int,
    working_bytes: int = 2,
    zero_points: bool = True,
    source: str = "",
) -> dict[str, tuple[BlockArray, Parameter]]:
    """`weight`, `weights_scaling_factor` and `zero` of codes, scales and offsets. `dtype`, called `name`: the model's type.

    `zero_points`: whether there is a `zero`; without it, offsets are zeros. `working_bytes`: what a byte of codes takes on its way,
    more than the codes where they are computed. `source`: the weight's name there, for what is wrong with its scales.
    """
    codes, scales, offsets = parameters[f"codes{layout.bits}"], parameters["scales"], parameters["offsets"]
    *front, out, width = codes.shape
    columns, per_feature = layout.columns, Fraction(layout.bits, 8)
    shape = (*front, out // columns, columns * width)
    chunks = (1,) * front[0] if front else row_chunks(out // columns, max(rows // columns, 1))
    weight = derive("quantize", arranged, {"codes": codes}, shape=shape, dtype=UINT8, rows=chunks, layout=layout)
    group = Fraction(scales.shape[-2], width) * per_feature
    grouped = Parameter(axes=(("group", group), ("out", ONE)))
    grid: dict[str, Any] = {"rows": scales.chunks[0] if front else None, "columns": scales.chunks[-1]}
    like: dict[str, Any] = {"shape": scales.shape, "dtype": dtype, **grid}
    limits: dict[str, Any] = {"to": dtype, "name": source, "largest": (1 << layout.bits) - 1}
    factors = derive("quantize", narrowed, {"values": scales}, **like, by_place=True, **limits)
    packed = Parameter(
        axes=(("out", Fraction(1, columns)), ("in", columns * per_feature)),
        header=(("in", ONE), ("out", per_feature / dtype.itemsize)),
        dtype=name,
        working_bytes=working_bytes,
    )
    result = {"weight": (weight, packed), "weights_scaling_factor": (factors, grouped)}
    if zero_points:
        inputs = {"offsets": offsets, "scales": scales}
        result["zero"] = derive("quantize", zero_of, inputs, **like, by_place=True, **limits), grouped
    return result


def pack_awq(parameters: Mapping[str, BlockArray], dtype: np.dtype, source: str = "") -> dict[str, tuple[BlockArray, Parameter]]:
    """`weight`, `weights_scaling_factor` and `prequant_scaling_factor` in ModelOpt's form. `source`: as for `pack_gptq`."""
    codes, scales = parameters["codes4"], parameters["scales"]
    out, width = codes.shape
    features = 2 * width
    weight = derive("quantize", paired, {"codes": codes}, shape=(out // 2, features), dtype=INT8)
    factors = derive("quantize", transposed_float, {"values": scales}, shape=scales.shape[::-1], dtype=FLOAT32, name=source)
    smooth = parameters.get("prequant")
    if smooth is None:
        smooth = derive("quantize", ones, {"codes": codes}, shape=(features,), dtype=dtype, to=dtype)
    else:
        smooth = derive("quantize", narrowed, {"values": smooth}, shape=smooth.shape, dtype=dtype, to=dtype, name=source)
    return {
        "weight": (weight, Parameter(axes=(("out", Fraction(1, 2)), ("in", ONE)), working_bytes=3)),
        "weights_scaling_factor": (factors, Parameter(axes=(("out", ONE), ("group", Fraction(scales.shape[-2], features))))),
        "prequant_scaling_factor": (smooth, Parameter(axes=(("in", ONE),))),
    }


def arranged(region: Region, codes: Block, layout: KernelLayout) -> np.ndarray:
    """uint8 [n / columns, columns * K * bits / 8]: the codes of the region in the kernel's order."""
    stream, shape = _rows(region, codes, layout.columns)
    with meter("quantize", stream.nbytes):
        return kernels().arranged(stream, layout).reshape(*shape, -1)[..., slice(*region[-1])]


def zero_of(region: Region, offsets: Block, scales: Block, to: np.dtype, name: str, largest: int) -> np.ndarray:
    """[groups, n]: offset * scale, both in the model's type, rounded once. Raises BadInput as `held` does."""
    # Products of 16-bit floats are no longer than a float32, so that this is the one rounding.
    factors = kernels().cast(narrowed(region, scales, to, name, largest), FLOAT32)
    values = np.asarray(offsets.read(region)).astype(FLOAT32)
    return held(kernels().cast(kernels().cast(values, to), FLOAT32) * factors, to, name)


def cast(region: Region, values: Block, to: np.dtype) -> np.ndarray:
    """The region in another type; too large for float16 becomes infinity, as in torch."""
    return kernels().cast(np.asarray(values.read(region)), to)


def narrowed(region: Region, values: Block, to: np.dtype, name: str, largest: float = math.inf) -> np.ndarray:
    """The region's scales in another type. Raises BadInput as `held` does."""
    return held(np.asarray(values.read(region)), to, name, largest)


def held(scales: np.ndarray, to: np.dtype, name: str, largest: float = math.inf) -> np.ndarray:
    """Scales in another type. Raises BadInput naming the weight where one is not finite, and where the type has infinity for one,
    or zero for one that is not.

    `largest`: the largest magnitude of a code. Where its weight is zero in that type, too, zero is right: quantizers give rows
    and groups of nothing but zeros some tiny scale.
    """
    result = kernels().cast(finite(scales, name), to)
    if scales.dtype == to:
        return result
    lost = (result == 0) & (scales != 0)
    if lost.any():
        lost[lost] = kernels().cast(np.abs(scales[lost].astype(np.float64)).astype(FLOAT32) * FLOAT32.type(largest), to) != 0
    lost |= np.isinf(result)
    if lost.any():
        found = f"a scale of {float(scales[lost][0]):.3g}, which {to.name} has as {float(result[lost][0]):g}"
        remedy = "Give --dtype bfloat16" if to == np.float16 else "Mend the checkpoint"
        raise BadInput([Problem(f"{name}: scales", found, f"scales that {to.name} holds", remedy)])
    return result


def transposed_float(region: Region, values: Block, name: str) -> np.ndarray:
    """float32 [n, groups] of [groups, n]. Raises BadInput naming the weight where a scale is not finite."""
    return np.ascontiguousarray(finite(np.asarray(values.read((region[1], region[0]))), name).T).astype(np.float32)


def ones(region: Region, codes: Block, to: np.dtype) -> np.ndarray:  # noqa: ARG001
    """Factors that change nothing."""
    return np.ones(region[0][1] - region[0][0], dtype=to)


def paired(region: Region, codes: Block) -> np.ndarray:
    """int8 [n / 2, K]: two's complement codes of out-features 2 i (low nibble) and 2 i + 1."""
    stream = np.ascontiguousarray(codes.read(((2 * region[0][0], 2 * region[0][1]), (0, codes.shape[1])))) ^ np.uint8(0x88)
    with meter("quantize", stream.nbytes):
        first, second = stream[0::2], stream[1::2]
        result = np.empty((len(first), 2 * stream.shape[1]), dtype=np.uint8)
        result[:, 0::2] = (first & 15) | (second << 4)
        result[:, 1::2] = (first >> 4) | (second & 0xF0)
    return result.view(np.int8)[:, slice(*region[1])]
