"""Quantized weights as numbers again, and the plain round-to-nearest quantizer by groups that takes numbers back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BadInput
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block
from stages.quantization.finite import not_finite
from stages.quantization.floats import e2m1, e4m3
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.sources.gptq import unpacked

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

FLOAT32, INT16, UINT8 = np.dtype(np.float32), np.dtype(np.int16), np.dtype(np.uint8)
_SCALED_BYTES = 4 << 20  # of float32 weights whose scales are computed at once


def dequantize(parameters: Mapping[str, BlockArray]) -> BlockArray:
    """The float32 weight [out, in] of a module's canonical quantized parameters."""
    if "fp8" in parameters:
        weight = parameters["fp8"]
        scale = parameters["channel_scale" if "channel_scale" in parameters else "tensor_scale"]
        return derive(
            "dequantize", from_float8, {"weight": weight, "scale": scale}, shape=weight.shape, dtype=FLOAT32, rows=weight.chunks[0]
        )
    if "fp4" in parameters:
        packed = parameters["fp4"]
        inputs = {"codes": packed, "scales": parameters["block_scale"], "scale": parameters["global_scale"]}
        inputs |= {"smooth": parameters["prequant"]} if "prequant" in parameters else {}
        shape = (packed.shape[0], 2 * packed.shape[1])
        return derive("dequantize", from_float4, inputs, shape=shape, dtype=FLOAT32, rows=packed.chunks[0])
    bits = 4 if "codes4" in parameters else 8
    codes = parameters[f"codes{bits}"]
    inputs = {"codes": codes, "scales": parameters["scales"], "offsets": parameters["offsets"]}
    inputs |= {key: parameters[name] for key, name in (("index", "group_index"), ("smooth", "prequant")) if name in parameters}
    shape = (codes.shape[0], codes.shape[1] * 8 // bits)
    return derive("dequantize", from_codes, inputs, shape=shape, dtype=FLOAT32, rows=codes.chunks[0], bits=bits)


def requantize(weight: BlockArray, group_size: int, name: str = "a dequantized weight", bits: int = 4) -> dict[str, BlockArray]:
    """`codes4` or `codes8`, `scales` and `offsets` of a weight of numbers, [out, in] or [experts, out, in]: symmetric, rounded to
    the nearest, by consecutive groups. `name`: its source's, for what is wrong with its values.
    """
    *front, out, features = weight.shape
    shape, rows = (*front, features // group_size, out), weight.chunks[0]
    arguments: dict[str, Any] = {"size": group_size, "bits": bits, "name": name}
    packed = (*front, out, features * bits // 8)
    codes = derive("quantize", codes_by_group, {"weight": weight}, shape=packed, dtype=UINT8, rows=rows, **arguments)
    # A scale takes all in-features of its group, so that these are cut by out-features, of which a block holds few.
    count = max(_SCALED_BYTES // (4 * features), 1)
    grid: dict[str, Any] = {"rows": rows if front else None, "columns": [min(count, out - start) for start in range(0, out, count)]}
    kind = np.dtype(np.float16)
    scales = derive("quantize", scales_by_group, {"weight": weight}, shape=shape, dtype=kind, **grid, **arguments)
    offsets = derive("quantize", zeros, {"weight": weight}, shape=shape, dtype=INT16, **grid)
    return {f"codes{bits}": codes, "scales": scales, "offsets": offsets}


# Below: products that are no number, as of an infinite scale, are refused by name where they are quantized, or written as the
# source has them; NumPy's warning names nothing.


def from_float8(region: Region, weight: Block, scale: Block) -> np.ndarray:
    """float32 of the region: code times scale."""
    values = np.asarray(weight.read(region))
    with meter("dequantize", values.nbytes), np.errstate(invalid="ignore", over="ignore"):
        factors = np.asarray(scale.read(whole(scale.shape)))
        wide = kernels().cast(values, FLOAT32)
        wide *= factors[slice(*region[0]), None] if factors.size > 1 else factors
        return wide


def from_float4(region: Region, codes: Block, scales: Block, scale: Block, smooth: Block | None = None) -> np.ndarray:
    """float32 of the region: value times the scale of its group, times the scale of all, times the factor of the activations."""
    rows, (left, right) = region
    size = 2 * codes.shape[1] // scales.shape[1]
    first, last = left // size, -(-right // size)
    stored = np.asarray(codes.read((rows, (first * size // 2, last * size // 2))))
    factors = e4m3(np.asarray(scales.read((rows, (first, last)))))
    with meter("dequantize", stored.nbytes), np.errstate(invalid="ignore", over="ignore"):
        values = e2m1(stored)
        values.reshape(len(values), -1, size)[...] *= factors[:, :, None]
        values *= np.float32(np.asarray(scale.read(whole(scale.shape))).reshape(-1)[0])
        if smooth is not None:
            values *= np.asarray(smooth.read(((first * size, last * size),))).astype(np.float32)
        return values[:, left - first * size : right - first * size]


def from_codes(
    region: Region, codes: Block, scales: Block, offsets: Block, bits: int, index: Block | None = None, smooth: Block | None = None
) -> np.ndarray:
    """float32 of the region: (code - middle + offset) * scale of the in-feature's group, times the factor of the activations."""
    groups = scales.shape[0]
    stream = np.ascontiguousarray(codes.read((region[0], (0, codes.shape[1]))))
    factors = np.asarray(scales.read(((0, groups), region[0]))).astype(np.float32).T
    shifts = np.asarray(offsets.read(((0, groups), region[0]))).astype(np.float32).T
    with meter("dequantize", stream.nbytes), np.errstate(invalid="ignore", over="ignore"):
        values = unpacked(stream, bits).astype(np.float32) - np.float32(1 << (bits - 1))
        features = values.shape[1]
        if index is None:
            grouped = values.reshape(len(values), groups, -1)
            grouped += shifts[:, :, None]
            grouped *= factors[:, :, None]
        else:
            order = np.asarray(index.read(((0, features),)))
            values = (values + shifts[:, order]) * factors[:, order]
        if smooth is not None:
            values *= np.asarray(smooth.read(((0, features),))).astype(np.float32)
        return values[:, slice(*region[1])]


def codes_by_group(region: Region, weight: Block, size: int, bits: int, name: str) -> np.ndarray:
    """uint8 [..., n, K * bits / 8] of the region: each value divided by its group's scale as stored, rounded to the nearest."""
    values = np.asarray(weight.read((*region[:-1], (0, weight.shape[-1]))))
    with meter("quantize", values.nbytes):
        groups = values.astype(np.float32, copy=False).reshape(-1, values.shape[-1] // size, size)
        scales, middle = _scales(groups, bits, name).astype(np.float32), 1 << (bits - 1)
        scales[scales == 0] = 1
        unsigned = (np.clip(np.rint(groups / scales[:, :, None]), -middle, middle - 1) + middle).astype(np.uint8)
        stream = unsigned.reshape(*values.shape[:-1], -1)
        if bits == 4:
            stream = stream[..., 0::2] | (stream[..., 1::2] << 4)
        return np.asarray(stream[..., slice(*region[-1])])


def scales_by_group(region: Region, weight: Block, size: int, bits: int, name: str) -> np.ndarray:
    """float16 [..., groups, n] of the region."""
    *front, (first, last), rows = region
    values = np.asarray(weight.read((*front, rows, (first * size, last * size))))
    with meter("quantize", values.nbytes):
        groups = values.astype(np.float32, copy=False).reshape(-1, last - first, size)
        scales = _scales(groups, bits, name).reshape(*values.shape[:-1], -1)
        return np.ascontiguousarray(scales.swapaxes(-1, -2))


def zeros(region: Region, weight: Block) -> np.ndarray:  # noqa: ARG001
    """int16 [..., groups, n]: the quantizer is symmetric."""
    return np.zeros([stop - start for start, stop in region], dtype=np.int16)


def _scales(groups: np.ndarray, bits: int, name: str) -> np.ndarray:
    """float16 [n, groups]: the step with which the range of the codes (of 4 bits -8 to 7) holds the largest magnitude, of whichever
    sign.

    Raises BadInput naming the tensor where a value is not finite, or too large for a step that is.
    """
    highest, lowest, middle = groups.max(axis=2), groups.min(axis=2), 1 << (bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.maximum(highest / np.float32(middle - 1), -lowest / np.float32(middle))
        # Of two zeros NumPy takes the one or the other, as its vectors have it: the sum is +0 for both.
        scales = (steps + np.float32(0)).astype(np.float16)
    if not np.all(np.isfinite(scales)):
        raise BadInput([not_finite(name)])
    return np.asarray(scales)
