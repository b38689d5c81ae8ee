"""Float8 weights with a scale for each tile of 128 x 128: DeepSeek's and Qwen3's FP8, and compressed-tensors' strategy `block`.

weight float8_e4m3fn [N, K], or a stack of experts [E, N, K]; weight_scale_inv, or compressed-tensors' weight_scale, [N / 128,
K / 128], rounded up, of each matrix, or one for the whole of it ([1, 1], [1] or []): weight = code * scale.
Facts: docs/format/quantized-layouts.md, section 9c; docs/format/runtime-1.2.md, section h3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.floats import e4m3
from stages.quantization.packed_format import OF_ALL, PackedFormat, PackedParameter
from stages.quantization.sources.fp8_scaled import flat

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_INPUTS = ("input_scale", "activation_scale")
_SCALES = ("weight_scale_inv", "weight_scale")
_TILE = (128, 128)
FLOAT32 = np.dtype(np.float32)


class BlockFp8(PackedFormat):
    """Modules of float8 weights with scales by tile."""

    name = "float8-block"
    title = "FP8 by block of DeepSeek or Qwen3 or compressed-tensors"
    numbers = True
    proof = "a reader written from its description alone"
    parameters: Mapping[str, PackedParameter] = {
        "weight_scale_inv": PackedParameter(("out", "in")),
        "weight_scale": PackedParameter(("out", "in")),
        **{name: PackedParameter(OF_ALL, dropped="the activations are not FP8 with one scale") for name in _INPUTS},
        "k_scale": PackedParameter(OF_ALL, becomes="kv_scale"),
        "v_scale": PackedParameter(OF_ALL, becomes="kv_scale"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is float8 and has scales for both of its axes."""
        if "weight" not in parameters or parameters["weight"].dtype != ml_dtypes.float8_e4m3fn:
            return False
        if "weight_scale_inv" in parameters:
            return True
        weight, scale = parameters["weight"].shape, getattr(parameters.get("weight_scale"), "shape", ())
        return len(weight) == len(scale) == 2 and scale not in ((1, 1), (weight[0], 1))

    def arrange(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """One scale of a whole matrix ([], [1], or [E] of a stack) as a tile's, [1, 1]."""
        name = next(name for name in _SCALES if name in tensors)
        scale, stack = tensors[name], tensors["weight"].shape[:-2]
        views: Any = scale
        if scale.shape not in ((), (1,), stack) or math.prod(scale.shape) != math.prod(stack) or not hasattr(scale, "viewed"):
            return tensors
        return {**tensors, name: views.viewed((*stack, 1, 1), scale.dtype)}

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse scales that are not one for each tile of the settings' size."""
        name = next(name for name in _SCALES if name in tensors)
        shape, scale = tensors["weight"].shape, tensors[name].shape
        if len(shape) not in (2, 3):
            return [Problem(f"{module}.weight", f"shape {list(shape)}", "a matrix, or a stack of them")]
        tile, stack = tile_size(settings), shape[:-2]
        wanted = (*stack, *(-(-length // size) for length, size in zip(shape[-2:], tile, strict=True))) if tile else ()
        if tile and scale in (wanted, (*stack, 1, 1)):
            return []
        expected = f"{list(wanted)}, one for each {tile[0]} x {tile[1]} of {list(shape)}" if tile else "two sizes of a tile"
        return [Problem(f"{module}.{name}", f"shape {list(scale)}", expected)]

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`weight`, float32, and the scales of a cache; the rest stays."""
        weight, name = parameters["weight"], next(name for name in _SCALES if name in parameters)
        inputs = {"codes": weight, "scales": parameters[name]}
        # One scale of a matrix has a single tile, which is all of it.
        tile = weight.shape[-2:] if parameters[name].shape[-2:] == (1, 1) else tile_size(settings)
        values = derive("unpack", from_tiles, inputs, shape=weight.shape, dtype=FLOAT32, rows=weight.chunks[0], tile=tile)
        rest = {key: array for key, array in parameters.items() if key not in ("weight", *_INPUTS, *_SCALES)}
        for key in {"k_scale", "v_scale"} & rest.keys():
            rest["kv_scale"] = derive("unpack", flat, {"values": rest.pop(key)}, shape=(1,), dtype=FLOAT32)
        return {"weight": values, **rest}


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
    whole = isinstance(sizes, list | tuple) and len(sizes) == 2 and all(str(size).isdigit() and int(size) for size in sizes)
    return tuple(map(int, sizes)) if whole else ()


def from_tiles(region: Region, codes: Block, scales: Block, tile: tuple[int, int]) -> np.ndarray:
    """float32 [..., n, k] of the region: code times the scale of its tile. Reads the scales of the region's tiles alone."""
    *stack, (top, bottom), (left, right) = region
    (height, width), stored = tile, np.asarray(codes.read(region))
    first, column = top // height, left // width
    within = (*stack, (first, math.ceil(bottom / height)), (column, math.ceil(right / width)))
    factors = np.asarray(scales.read(within)).astype(np.float32)
    with meter("unpack", stored.nbytes):
        values = e4m3(stored)
        of_column = np.arange(left, right) // width - column
        # A row of tiles at a time: no matrix of factors is made.
        for row in range(first, first + factors.shape[-2]):
            start, stop = max(row * height, top), min((row + 1) * height, bottom)
            values[..., start - top : stop - top, :] *= factors[..., row - first, :][..., None, of_column]
        return values


FORMAT = BlockFp8()
