"""Float8 weights with a scale for each tile: by block (DeepSeek, Qwen3, compressed-tensors, ModelOpt), GPTQModel's FP8, and MXFP8.

weight float8_e4m3fn [N, K], or a stack of experts [E, N, K]; weight_scale_inv, or weight_scale, [N / 128, K / 128], rounded up, of
each matrix (ModelOpt: [N / 128, 1, K / 128, 1]), or one for the whole of it ([1, 1], [1] or []), or for each row (GPTQModel: [N]):
weight = code * scale; where the settings say that scales are inverse (GPTQModel), code / scale. MXFP8: weight_scale uint8 or
float8_e8m0fnu [N, K / 32], exponents of powers of two. Facts: docs/format/quantized-layouts.md, section 9c;
docs/format/runtime-1.2.md, section h3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.floats import e4m3, e8m0
from stages.quantization.packed_format import OF_ALL, PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_INPUTS = ("input_scale", "activation_scale")
_SCALES = ("weight_scale_inv", "weight_scale")
_TILE = (128, 128)
_MX = (1, 32)  # the rows and in-features of a power of two
_EXPONENTS = ("uint8", "float8_e8m0fnu")
FLOAT32 = np.dtype(np.float32)


class BlockFp8(PackedFormat):
    """Modules of float8 weights with scales by tile."""

    name = "float8-block"
    title = "FP8 by block of DeepSeek or Qwen3 or compressed-tensors, FP8 of GPTQModel, or MXFP8"
    numbers = True
    proof = "compressed-tensors 0.19, ModelOpt 0.47, GPTQModel 7.6 (AutoRound 0.15: MXFP8), value for value"
    parameters: Mapping[str, PackedParameter] = {
        "weight_scale_inv": PackedParameter(("out", "in")),
        "weight_scale": PackedParameter(("out", "in")),
        **{name: PackedParameter(OF_ALL, dropped="the activations are not FP8 with one scale") for name in _INPUTS},
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is float8 and has scales for both of its axes."""
        if "weight" not in parameters or parameters["weight"].dtype != ml_dtypes.float8_e4m3fn:
            return False
        if "weight_scale_inv" in parameters:
            return True
        weight, scale = parameters["weight"].shape, getattr(parameters.get("weight_scale"), "shape", ())
        if len(weight) != 2 or len(scale) not in (2, 4):
            return False
        return parameters["weight_scale"].dtype.name in _EXPONENTS or scale not in ((1, 1), (weight[0], 1))

    def arrange(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """Scales as [rows of tiles, columns of tiles]: of a whole matrix ([], [1], or [E] of a stack), of each row ([N]), and
        ModelOpt's.
        """
        name = next(name for name in _SCALES if name in tensors)
        scale, stack, rows = tensors[name], tensors["weight"].shape[:-2], tensors["weight"].shape[-2:-1]
        views: Any = scale
        tiles: tuple[int, ...] = scale.shape
        if scale.shape in ((), (1,), stack) and math.prod(scale.shape) == math.prod(stack):
            tiles = (*stack, 1, 1)
        elif scale.shape == rows:
            tiles = (*rows, 1)
        elif len(scale.shape) == 4 and scale.shape[1::2] == (1, 1):
            tiles = scale.shape[0::2]
        return {**tensors, name: views.viewed(tiles, scale.dtype)} if tiles != scale.shape and hasattr(scale, "viewed") else tensors

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse scales that are not one for each tile of the settings' size."""
        name = next(name for name in _SCALES if name in tensors)
        shape, scale = tensors["weight"].shape, tensors[name].shape
        if len(shape) not in (2, 3) or not math.prod(shape):
            return [Problem(f"{module}.weight", f"shape {list(shape)}", "a matrix that has values, or a stack of them")]
        tile, stack = tile_of(shape, scale, tensors[name].dtype, settings), shape[:-2]
        if (said := settings.get("weight_scale_semantics", "inverse")) != "inverse":
            return [Problem(f"{module}.{name}", f"weight_scale_semantics {said!r} in the settings", "inverse, or none")]
        wanted = (*stack, *(-(-length // size) for length, size in zip(shape[-2:], tile, strict=True))) if tile else ()
        if tile and scale == wanted:
            return []
        expected = f"{list(wanted)}, one for each {tile[0]} x {tile[1]} of {list(shape)}" if tile else "two sizes of a tile"
        return [Problem(f"{module}.{name}", f"shape {list(scale)}", expected)]

    def heights(self, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, int]:
        """The rows of a tile, for its scales."""
        name = next(name for name in _SCALES if name in tensors)
        return {name: tile_of(tensors["weight"].shape, tensors[name].shape, tensors[name].dtype, settings)[0]}

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`weight`, float32; the rest stays."""
        weight, name = parameters["weight"], next(name for name in _SCALES if name in parameters)
        inputs = {"codes": weight, "scales": parameters[name]}
        tile = tile_of(weight.shape, parameters[name].shape, parameters[name].dtype, settings)
        like: dict[str, Any] = {"shape": weight.shape, "dtype": FLOAT32, "rows": weight.chunks[0]}
        values = derive("unpack", from_tiles, inputs, **like, tile=tile, divides="weight_scale_semantics" in settings)
        rest = {key: array for key, array in parameters.items() if key not in ("weight", *_INPUTS, *_SCALES)}
        return {"weight": values, **rest}


def tile_of(weight: tuple[int, ...], scale: tuple[int, ...], dtype: np.dtype, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows and columns of a module's tile, by its shapes; nothing where the settings say what is no size."""
    if scale[-2:] == (1, 1):
        return weight[-2:]  # all of a matrix is one
    if scale == (weight[0], 1):
        return 1, weight[-1]
    return _MX if dtype.name in _EXPONENTS and scale[-2:-1] == weight[-2:-1] else tile_size(settings)


def tile_size(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The rows and columns of a tile, as the settings say, or 128 of each; nothing where they say what is no size."""
    said: Any = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        said = said or (weights.get("block_structure") if isinstance(weights, Mapping) else None)
    if not said:
        return _TILE
    sizes = said.lower().split("x") if isinstance(said, str) else said
    pair = isinstance(sizes, list | tuple) and len(sizes) == 2
    return tuple(map(int, sizes)) if pair and all(re.fullmatch("[1-9][0-9]{0,8}", str(size)) for size in sizes) else ()


def from_tiles(region: Region, codes: Block, scales: Block, tile: tuple[int, int], divides: bool = False) -> np.ndarray:
    """float32 [..., n, k] of the region: code times the scale of its tile, or divided by it. Reads the scales of the region's tiles
    alone.
    """
    *stack, (top, bottom), (left, right) = region
    (height, width), stored = tile, np.asarray(codes.read(region))
    first, column = top // height, left // width
    within = (*stack, (first, math.ceil(bottom / height)), (column, math.ceil(right / width)))
    read = np.asarray(scales.read(within))
    factors = e8m0(read) if read.dtype.name in _EXPONENTS else read.astype(np.float32)
    apply = np.divide if divides else np.multiply
    with meter("unpack", stored.nbytes):
        values = e4m3(stored)
        of_column = np.arange(left, right) // width - column
        if height == 1:
            apply(values, factors[..., of_column], out=values)
            return values
        # A row of tiles at a time: no matrix of factors is made.
        for row in range(first, first + factors.shape[-2]):
            start, stop = max(row * height, top), min((row + 1) * height, bottom)
            part = values[..., start - top : stop - top, :]
            apply(part, factors[..., row - first, :][..., None, of_column], out=part)
        return values


FORMAT = BlockFp8()
