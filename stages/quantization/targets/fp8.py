"""FP8 and FP8_PER_CHANNEL_PER_TOKEN: float8 weights, row-major, with one scale or one for each out-feature.

Facts: docs/format/quantized-layouts.md, sections 4b, 4c, 7 and 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.noted import Notes, derive_noting
from pipeline.tensor.placement import Region, extent, whole
from pipeline.tensor.tensors import Block, Parameter, plain
from stages.quantization.finite import finite
from stages.quantization.kernels.dispatch import kernels

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

Entries = dict[str, tuple["BlockArray", Parameter]]
Named = tuple[str, "BlockArray"]  # a scale with its weight's name in the source
ONE = Fraction(1)
FLOAT32, FLOAT8 = np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
MATRIX = Parameter(axes=(("out", ONE), ("in", ONE)), working_bytes=8)


def pack_tensor(names: Sequence[str], parts: Sequence[Mapping[str, BlockArray]]) -> tuple[list[Entries], Entries]:
    """The weight of each part of a fused module, and what they share: the largest of their scales, which all are brought to.

    `names`: of the weights in the source, for what is wrong with their scales.
    """
    common = largest([part["tensor_scale"] for part in parts], names)
    weights = []
    for part in parts:
        weight = part["fp8"]
        if len(parts) > 1:
            inputs = {"weight": weight, "scale": part["tensor_scale"], "common": common}
            weight = derive("quantize", rescaled, inputs, shape=weight.shape, dtype=FLOAT8, rows=weight.chunks[0])
        weights.append({"weight": (weight, MATRIX)})
    activations = largest([part["input_scale"] for part in parts], names)
    scale = plain("tensor_scale")
    return weights, {"weights_scaling_factor": (common, scale), "activation_scaling_factor": (activations, scale)}


def pack_stack(scales: Sequence[Sequence[Named]], shares: int) -> tuple[BlockArray, Parameter]:
    """The scale of the activations of a stack of experts on each rank: the largest of those of the rank's experts.

    `scales`: of each expert's parts, with their weights' names in the source, the experts in order. `shares`: into how many equal
    parts the ranks divide the experts.
    """
    each = [named for expert in scales for named in expert]
    inputs = {f"scale{number}": scale for number, (_, scale) in enumerate(each)}
    counts, names = tuple(len(expert) for expert in scales), tuple(name for name, _ in each)
    arguments: dict[str, Any] = {"names": names, "shares": shares, "counts": counts}
    array = derive("quantize", largest_by_share, inputs, shape=(shares,), dtype=FLOAT32, **arguments)
    return array, Parameter(axes=(("expert", Fraction(shares, len(scales))),))


def pack_channels(name: str, part: Mapping[str, BlockArray]) -> Entries:
    """`weight` and `per_channel_scale` of a float8 weight that has a scale for each out-feature, or one that stands for all.

    `name`: of the weight in the source, for what is wrong with its scales.
    """
    weight = part["fp8"]
    scale = part["channel_scale" if "channel_scale" in part else "tensor_scale"]
    scales = derive("quantize", row_scales, {"scale": scale}, shape=weight.shape[:1], dtype=FLOAT32, name=name)
    return {"weight": (weight, MATRIX), "per_channel_scale": (scales, Parameter(axes=(("out", ONE),)))}


def quantize_channels(name: str, weight: BlockArray, segments: int, clamp: float) -> Entries:
    """`weight` and `per_channel_scale` of a 16-bit weight [out, in] or [experts, out, in], a scale for each rank's share of a
    row.
    """
    features = weight.shape[-1]
    arguments: dict[str, Any] = {"name": name, "segments": segments, "clamp": clamp}
    notes = Notes(scales_of, FLOAT32, 1, segments)
    codes, scales = derive_noting(
        "quantize", quantized, notes, {"weight": weight}, shape=weight.shape, dtype=FLOAT8, rows=weight.chunks[0], **arguments
    )
    by_row = Parameter(
        axes=(("out", ONE), ("in", Fraction(segments, features))),
        header=(("out", ONE),),
        dtype="float32",
        working_bytes=8 * features // segments,  # a scale takes all of its segment's weights
    )
    return {"weight": (codes, MATRIX), "per_channel_scale": (scales, by_row)}


def quantized(region: Region, weight: Block, name: str, segments: int, clamp: float) -> tuple[np.ndarray, np.ndarray]:
    """float8 of the region's rows, each value divided by its segment's scale; and the scales, float32 [n, segments]."""
    values, shape = _rows(region, weight)
    with meter("quantize", values.nbytes):
        codes, scales = kernels().float8_codes(values, segments, clamp, name)
        return codes.reshape(*shape, -1)[..., slice(*region[-1])], scales.reshape(*shape, segments)


def scales_of(region: Region, weight: Block, name: str, segments: int, clamp: float) -> np.ndarray:
    """float32 [n, segments]."""
    values, shape = _rows(region, weight)
    with meter("quantize", values.nbytes):
        return kernels().float8_scales(values, segments, clamp, name).reshape(*shape, -1)[..., slice(*region[-1])]


def rescaled(region: Region, weight: Block, scale: Block, common: Block) -> np.ndarray:
    """float8 codes of one scale as codes of another: multiplied, divided, then rounded once."""
    values = np.asarray(weight.read(region))
    with meter("quantize", values.nbytes):
        return kernels().float8_rescaled(values, _scalar(scale), _scalar(common))


def spread(region: Region, scale: Block) -> np.ndarray:
    """One scale for each of the region's out-features."""
    return np.full(extent(region), _scalar(scale), dtype=np.float32)


def row_scales(region: Region, scale: Block, name: str) -> np.ndarray:
    """float32 [n]: the scale of each of the region's out-features. Raises BadInput naming the weight where one is not finite."""
    values = finite(np.asarray(scale.read(region if scale.size > 1 else whole(scale.shape))).reshape(-1), name)
    return np.broadcast_to(values, extent(region)).astype(np.float32)


def largest_of(region: Region, names: Sequence[str], **scales: Block) -> np.ndarray:  # noqa: ARG001
    """float32 [1]: the largest of several scales. Raises BadInput naming the weight, where `names` has one, of one not finite."""
    return np.array([np.max(_finite(names, scales.values()))], dtype=np.float32)


def largest_by_share(region: Region, names: Sequence[str], shares: int, counts: tuple[int, ...], **scales: Block) -> np.ndarray:
    """float32 [shares]: the largest of the scales of each share's experts. `counts`: how many of the scales each expert has.

    Raises BadInput naming the weight of one that is not finite.
    """
    values = iter(_finite(names, scales.values()))
    by_expert = [max(next(values) for _ in range(count)) for count in counts]
    result: np.ndarray = np.array(by_expert, dtype=np.float32).reshape(shares, -1).max(axis=1)[slice(*region[0])]
    return result


def as_scale(values: BlockArray) -> BlockArray:
    """float32 [1] of a single value, whatever its shape and type."""
    return derive("unpack", spread, {"scale": values}, shape=(1,), dtype=FLOAT32)


def largest(scales: Sequence[BlockArray], names: Sequence[str] = ()) -> BlockArray:
    """float32 [1]: the largest of several scales of one element. `names`: of their weights, where what is not finite is refused."""
    if len(scales) == 1 and not names:
        return scales[0]
    inputs = {f"scale{number}": scale for number, scale in enumerate(scales)}
    return derive("quantize", largest_of, inputs, shape=(1,), dtype=FLOAT32, names=tuple(names))


def _finite(names: Sequence[str], scales: Iterable[Block]) -> list[np.float32]:
    """The values of scales of one element. Raises BadInput naming the weight, where `names` has one, of one that is not finite."""
    values = [_scalar(scale) for scale in scales]
    for name, value in zip(names, values, strict=False):
        finite(np.asarray(value), name)
    return values


def _scalar(scale: Block) -> np.float32:
    return np.float32(np.asarray(scale.read(whole(scale.shape))).reshape(-1)[0])


def _rows(region: Region, weight: Block) -> tuple[np.ndarray, tuple[int, ...]]:
    values = np.asarray(weight.read((*region[:-1], (0, weight.shape[-1]))))
    return values.reshape(-1, weight.shape[-1]), extent(region)[:-1]
