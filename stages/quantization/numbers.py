"""Quantized weights as numbers again, and the plain round-to-nearest quantizer by groups that takes them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import BadInput
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block
from stages.quantization.sources.gptq import unpacked
from stages.quantization.targets.weight_only import not_finite

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
    bits = 4 if "codes4" in parameters else 8
    codes = parameters[f"codes{bits}"]
    inputs = {"codes": codes, "scales": parameters["scales"], "offsets": parameters["offsets"]}
    inputs |= {key: parameters[name] for key, name in (("index", "group_index"), ("smooth", "prequant")) if name in parameters}
    shape = (codes.shape[0], codes.shape[1] * 8 // bits)
    return derive("dequantize", from_codes, inputs, shape=shape, dtype=FLOAT32, rows=codes.chunks[0], bits=bits)


def requantize(weight: BlockArray, group_size: int, name: str = "a dequantized weight") -> dict[str, BlockArray]:
    """4-bit `codes`, `scales` and `offsets` of a float32 weight [out, in]: symmetric, rounded to the nearest, by consecutive
    groups. `name`: its source's, for what is wrong with its values.
    """
    out, features = weight.shape
    shape, rows = (features // group_size, out), weight.chunks[0]
    arguments: dict[str, Any] = {"size": group_size, "name": name}
    codes = derive("quantize", codes_by_group, {"weight": weight}, shape=(out, features // 2), dtype=UINT8, rows=rows, **arguments)
    # A scale takes all in-features of its group, so that these are cut by out-features, of which a block holds few.
    count = max(_SCALED_BYTES // (4 * features), 1)
    columns = [min(count, out - start) for start in range(0, out, count)]
    kind = np.dtype(np.float16)
    scales = derive("quantize", scales_by_group, {"weight": weight}, shape=shape, dtype=kind, columns=columns, **arguments)
    offsets = derive("quantize", zeros, {"weight": weight}, shape=shape, dtype=INT16)
    return {"codes4": codes, "scales": scales, "offsets": offsets}


def from_float8(region: Region, weight: Block, scale: Block) -> np.ndarray:
    """float32 of the region: code times scale."""
    values = np.asarray(weight.read(region))
    with meter("dequantize", values.nbytes):
        factors = np.asarray(scale.read(whole(scale.shape)))
        return np.asarray(values.astype(np.float32) * (factors[slice(*region[0]), None] if factors.size > 1 else factors))


def from_codes(
    region: Region, codes: Block, scales: Block, offsets: Block, bits: int, index: Block | None = None, smooth: Block | None = None
) -> np.ndarray:
    """float32 of the region: (code - middle + offset) * scale of the in-feature's group, times the factor of the activations."""
    groups = scales.shape[0]
    stream = np.ascontiguousarray(codes.read((region[0], (0, codes.shape[1]))))
    factors = np.asarray(scales.read(((0, groups), region[0]))).astype(np.float32).T
    shifts = np.asarray(offsets.read(((0, groups), region[0]))).astype(np.float32).T
    with meter("dequantize", stream.nbytes):
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


def codes_by_group(region: Region, weight: Block, size: int, name: str) -> np.ndarray:
    """uint8 [n, K / 2] of the region: each value divided by its group's scale as stored, rounded to the nearest."""
    values = np.asarray(weight.read((region[0], (0, weight.shape[1]))))
    with meter("quantize", values.nbytes):
        groups = values.reshape(len(values), -1, size)
        scales = _scales(groups, name).astype(np.float32)
        scales[scales == 0] = 1
        signed = np.clip(np.rint(groups / scales[:, :, None]), -8, 7).astype(np.int8).reshape(len(values), -1)
        unsigned = (signed + np.int8(8)).view(np.uint8)
        return (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4))[:, slice(*region[1])]


def scales_by_group(region: Region, weight: Block, size: int, name: str) -> np.ndarray:
    """float16 [groups, n] of the region."""
    values = np.asarray(weight.read((region[1], (region[0][0] * size, region[0][1] * size))))
    with meter("quantize", values.nbytes):
        return np.ascontiguousarray(_scales(values.reshape(len(values), -1, size), name).T)


def zeros(region: Region, weight: Block) -> np.ndarray:  # noqa: ARG001
    """int16 [groups, n]: the quantizer is symmetric."""
    return np.zeros([stop - start for start, stop in region], dtype=np.int16)


def _scales(groups: np.ndarray, name: str) -> np.ndarray:
    """float16 [n, groups]: the step with which the range from -8 to 7 holds the largest magnitude, of whichever sign.

    Raises BadInput naming the tensor where a value is not finite, or too large for a step that is.
    """
    highest, lowest = groups.max(axis=2), groups.min(axis=2)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = np.maximum(highest / np.float32(7), -lowest / np.float32(8)).astype(np.float16)
    if not np.all(np.isfinite(scales)):
        raise BadInput([not_finite(name)])
    return np.asarray(scales)
