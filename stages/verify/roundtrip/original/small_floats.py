"""Weights of 4-bit floats, and of float8 with scales by tile, as numbers. Facts: docs/format/quantized-layouts.md, section 9c."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers
from stages.verify.values import read

# The sixteen values of e2m1: a sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])


def by_tile(weight: LazyTensor, scale: LazyTensor) -> bool:
    """Whether a scale is one for each tile of a float8 matrix: not one for all, nor one for each row."""
    return len(weight.shape) == len(scale.shape) == 2 and scale.shape != (1, 1) and scale.shape[0] != weight.shape[0]


@dataclass(frozen=True)
class TileNumbers(Numbers):
    """weight * the scale of its tile, of float8 [out_features, in_features]; `tile`: its rows and columns.

    With `front`, rows `start` to `start + count` of one matrix of a stack, as those of StoredNumbers.
    """

    weight: LazyTensor
    scales: LazyTensor
    tile: tuple[int, int]
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

    def rows(self, start: int, stop: int) -> Tensor:
        height, width = self.tile
        start, stop = self.start + start, self.start + stop
        first, last = start // height, -(-stop // height)
        scales = StoredNumbers(self.scales, self.front).rows(first, last).float()
        of_rows = scales[torch.arange(start, stop) // height - first]
        values = StoredNumbers(self.weight, self.front).rows(start, stop).float()
        return values * of_rows.repeat_interleave(width, 1)[:, : values.shape[1]]


def tile_numbers(module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Numbers:
    """The weight of a module with scales by tile. Raises BadInput where there is not one for each tile."""
    weight = tensors["weight"]
    scales: Any = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    tile = _tile(settings)
    stack = tuple(weight.shape[:-2])
    if scales.shape in ((), (1,), stack, (*stack, 1, 1)) and hasattr(scales, "viewed"):
        scales = scales.viewed((*stack, 1, 1), scales.dtype)
        tile = (weight.shape[-2], weight.shape[-1])  # one for all of a matrix
    wanted = (*stack, *(-(-length // size) for length, size in zip(weight.shape[-2:], tile, strict=False)))
    if scales.shape != wanted or weight.dtype.name != "float8_e4m3fn":
        found = f"scales {list(scales.shape)} of {weight.dtype} {list(weight.shape)}"
        raise BadInput([Problem(f"{module}.weight", found, f"float8_e4m3fn with a scale for each {tile[0]} x {tile[1]}")])
    return TileNumbers(weight, scales, tile)


def _tile(settings: Mapping[str, Any]) -> tuple[int, int]:
    groups = settings.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    sizes = [settings.get("weight_block_size"), *(each.get("block_structure") for each in schemes)]
    said = next(filter(None, sizes), None)
    height, width = said.split("x") if isinstance(said, str) else said or (128, 128)
    return int(height), int(width)


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

    def rows(self, start: int, stop: int) -> Tensor:
        data = StoredNumbers(self.weight).rows(start, stop)
        scales = read(self.scales, ((start, stop), (0, self.scales.shape[1])))
        if scales.dtype != torch.float8_e4m3fn:
            scales = torch.exp2(scales.view(torch.uint8).double() - 127)
        codes = torch.stack([data & 15, data >> 4], -1).reshape(stop - start, scales.shape[1], -1)
        values = (E2M1[codes.long()] * scales.float().unsqueeze(-1)).reshape(stop - start, -1)
        if self.whole is not None:
            factor = read(self.whole).float().reshape(())
            values = values * (1 / factor if self.divides else factor)
        return values if self.smooth is None else values * read(self.smooth).float()


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
