"""Weights of 4-bit floats, and of float8 with scales by tile, as numbers. Facts: docs/format/quantized-layouts.md, section 9c."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers
from stages.verify.values import halves, read, to_float32

# The sixteen values of e2m1: a sign, two bits of exponent, one of mantissa.
E2M1 = np.array([sign * size for sign in (1, -1) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)], dtype=np.float32)

EXPONENTS = ("uint8", "float8_e8m0fnu")  # of powers of two, with a bias of 127


def by_tile(weight: LazyTensor, scale: LazyTensor) -> bool:
    """Whether a scale is one for each tile of a float8 matrix, or a power of two: not one for all, nor one for each row."""
    if len(weight.shape) != 2 or scale.dtype.name in EXPONENTS:
        return len(weight.shape) == len(scale.shape) == 2
    return len(scale.shape) == 4 or (len(scale.shape) == 2 and scale.shape != (1, 1) and scale.shape[0] != weight.shape[0])


@dataclass(frozen=True)
class TileNumbers(Numbers):
    """weight * the scale of its tile, of float8 [out_features, in_features]; `tile`: its rows and columns.

    `inverse`: weight / the scale. With `front`, rows `start` to `start + count` of one matrix of a stack, as those of
    StoredNumbers.
    """

    weight: LazyTensor
    scales: LazyTensor
    tile: tuple[int, int]
    inverse: bool = False
    front: tuple[int, ...] = ()
    start: int = 0
    count: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.weight.shape[len(self.front) :]
        return shape if self.count is None else (self.count, *shape[1:])

    def part(self, expert: int, first: int, count: int) -> TileNumbers:
        """Rows `first` to `first + count` of matrix `expert`, of a stack [experts, rows, columns]."""
        return replace(self, front=(expert,), start=first, count=count)

    def rows(self, start: int, stop: int) -> np.ndarray:
        height, width = self.tile
        start, stop = self.start + start, self.start + stop
        first, last = start // height, -(-stop // height)
        scales = _factors(StoredNumbers(self.scales, self.front).rows(first, last))[np.arange(start, stop) // height - first]
        values = to_float32(StoredNumbers(self.weight, self.front).rows(start, stop))
        factors = np.repeat(scales, width, axis=1)[:, : values.shape[1]]
        result: np.ndarray = values / factors if self.inverse else values * factors
        return result


def _factors(stored: np.ndarray) -> np.ndarray:
    """Scales as float32: bytes are exponents of two."""
    if stored.dtype.name in EXPONENTS:
        return np.exp2(stored.view(np.uint8).astype(np.float64) - 127).astype(np.float32)
    return to_float32(stored)


def tile_numbers(module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Numbers:
    """The weight of a module with scales by tile. Raises BadInput where there is not one for each tile, or tiles have no size."""
    weight = tensors["weight"]
    scales: Any = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    tile = _tile(settings)
    stack = tuple(weight.shape[:-2])
    if scales.shape in ((), (1,), stack, (*stack, 1, 1)) and hasattr(scales, "viewed"):
        scales = scales.viewed((*stack, 1, 1), scales.dtype)
        tile = (weight.shape[-2], weight.shape[-1])  # one for all of a matrix
    elif scales.shape in (weight.shape[:1], (weight.shape[0], 1)) and hasattr(scales, "viewed"):
        scales, tile = scales.viewed((weight.shape[0], 1), scales.dtype), (1, weight.shape[-1])
    elif len(scales.shape) == 4 and scales.shape[1::2] == (1, 1) and hasattr(scales, "viewed"):
        scales = scales.viewed(scales.shape[0::2], scales.dtype)
    elif scales.dtype.name in EXPONENTS and scales.shape[0] == weight.shape[0]:
        tile = (1, 32)
    if tile is None:
        raise BadInput([Problem(f"{module}.weight", "settings that say no size of a tile", "two sizes, as [128, 128]")])
    wanted = (*stack, *(-(-length // size) for length, size in zip(weight.shape[-2:], tile, strict=False)))
    if scales.shape != wanted or weight.dtype.name != "float8_e4m3fn":
        found = f"scales {list(scales.shape)} of {weight.dtype} {list(weight.shape)}"
        raise BadInput([Problem(f"{module}.weight", found, f"float8_e4m3fn with a scale for each {tile[0]} x {tile[1]}")])
    return TileNumbers(weight, scales, tile, "weight_scale_semantics" in settings)


def _tile(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a tile by the settings, 128 where they say nothing; None where they say what is no size."""
    groups = settings.get("config_groups")
    parts = groups.values() if isinstance(groups, Mapping) else ()
    schemes = [group.get("weights") for group in parts if isinstance(group, Mapping)]
    sizes = [settings.get("weight_block_size"), *(each.get("block_structure") for each in schemes if isinstance(each, Mapping))]
    said: Any = next(filter(None, sizes), "128x128")
    given = said.lower().split("x") if isinstance(said, str) else said if isinstance(said, list | tuple) else ()
    found = [int(size) for size in map(str, given) if re.fullmatch("[1-9][0-9]{0,8}", size)]
    return (found[0], found[1]) if len(found) == len(given) == 2 else None


@dataclass(frozen=True)
class Float4Numbers(Numbers):
    """e2m1 * the scale of its group (* the scale of all), of pairs uint8 [out_features, in_features / 2], the first one low.

    `scales` [out_features, groups]: float8, or exponents of two with a bias of 127. `whole`: the scale of all, which `divides` or
    multiplies. `smooth` [in_features] is multiplied in.
    """

    weight: LazyTensor
    scales: LazyTensor
    whole: LazyTensor | None = None
    divides: bool = False
    smooth: LazyTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape[0], 2 * self.weight.shape[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        data = StoredNumbers(self.weight).rows(start, stop)
        stored = read(self.scales, ((start, stop), (0, self.scales.shape[1])))
        if stored.dtype.name == "float8_e4m3fn":
            scales = to_float32(stored)
        else:
            scales = _factors(stored)
        values = np.take(E2M1, halves(data), mode="clip")
        values.reshape(*scales.shape, -1)[...] *= scales[:, :, None]
        if self.whole is not None:
            factor = to_float32(read(self.whole)).reshape(())
            values *= np.float32(1) / factor if self.divides else factor
        if self.smooth is not None:
            values *= to_float32(read(self.smooth)).reshape(-1)
        return values


def float4_numbers(module: str, tensors: Mapping[str, LazyTensor]) -> Numbers:
    """The weight of a module of 4-bit floats. Raises BadInput where scales and weight do not fit."""
    weight, scales = tensors.get("weight_packed", tensors.get("weight")), tensors["weight_scale"]
    assert weight is not None, "asked for with one"
    size = 16 if scales.dtype.name == "float8_e4m3fn" else 32
    if len(weight.shape) != 2 or scales.shape != (weight.shape[0], 2 * weight.shape[1] // size) or 2 * weight.shape[1] % size:
        found = f"{weight.dtype} {list(weight.shape)} and scales {list(scales.shape)}"
        raise BadInput([Problem(f"{module}.weight", found, f"two in-features a byte, and a scale for each {size} of them")])
    divides = "weight_global_scale" in tensors
    whole = tensors.get("weight_global_scale", tensors.get("weight_scale_2"))
    if whole is not None and math.prod(whole.shape) != 1:
        raise BadInput([Problem(f"{module}.weight", f"scales of all {list(whole.shape)}", "one")])
    return Float4Numbers(weight, scales, whole, divides, tensors.get("pre_quant_scale"))
