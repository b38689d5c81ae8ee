"""HQQ's weights as numbers. Facts: docs/format/quantized-layouts.md, section 9c."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.numbers import Numbers
from stages.verify.values import read, to_float32

# What a module says of itself, which its numbers do not need or which `shape` says already.
TALK: tuple[str, ...] = (
    "nbits",
    "group_size",
    "axis",
    "packing",
    "view_as_float",
    "unpack_view_dtype",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)


class HqqNumbers(Numbers):
    """(code - zero) * scale of groups along the in-features, or (axis 0) across them. A byte of `W_q` holds p codes.

    These are of groups, or lines of groups, that are as far apart as `W_q` has rows. Raises BadInput where codes and scales are not
    of the shape that the module says.
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor]) -> None:
        self.codes, self.scale, self.zero = (tensors[name] for name in ("W_q", "scale", "zero"))
        said = read(tensors["shape"]).reshape(-1).tolist()
        groups = math.prod(self.scale.shape)
        self.across = "axis" in tensors and read(tensors["axis"]).reshape(-1).tolist() == [0]
        if self.across:
            self._across(module, said, groups)
            return
        self.count = groups // self.codes.shape[0] if self.codes.shape[0] else 0
        sound = len(said) == 2 and groups * self.codes.shape[-1] == said[0] * said[1] and self.count in (1, 2, 4, 8)
        if not sound or self.codes.dtype.name != "uint8" or said[1] % self.codes.shape[1]:
            found = f"codes {list(self.codes.shape)} and {groups} scales for {said}"
            raise BadInput([Problem(f"{module}.W_q", found, "a scale for each group of in-features")])
        self.out, self.features = said

    def _across(self, module: str, said: list[int], groups: int) -> None:
        stored = math.prod(self.codes.shape)
        self.count = math.prod(said) // stored if stored else 0
        sound = len(said) == 2 and math.prod(said) == stored * self.count and self.count in (1, 2, 4, 8)
        if not sound or self.codes.dtype.name != "uint8" or self.codes.shape[-1] != groups:
            found = f"codes {list(self.codes.shape)} and {groups} scales for {said}"
            raise BadInput([Problem(f"{module}.W_q", found, "a scale for each column of codes")])
        self.out, self.features = said

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out, self.features

    def rows(self, start: int, stop: int) -> np.ndarray:
        step, size = self.codes.shape
        if self.across:
            return self._columns(start, stop)
        each = self.features // size
        groups = np.arange(start * each, stop * each)
        row, place = groups % step, groups // step
        low, high = int(row.min()), int(row.max()) + 1
        data = read(self.codes, ((low, high), (0, size)))[row - low]
        shifts = (8 // self.count * (self.count - 1 - place)).astype(np.uint8)[:, None]
        codes = (data >> shifts) & np.uint8((1 << 8 // self.count) - 1)
        scale, zero = (to_float32(read(tensor).reshape(-1)[groups])[:, None] for tensor in (self.scale, self.zero))
        values = (codes.astype(np.float32) - zero) * scale
        result: np.ndarray = values.reshape(stop - start, self.features)
        return result

    def _columns(self, start: int, stop: int) -> np.ndarray:
        """Rows of axis 0, value by value: its place in the whole says the row and column of the matrix of groups."""
        lines, groups = self.codes.shape
        numbers = np.arange(start * self.features, stop * self.features)
        row, column = numbers // groups, numbers % groups
        line, place = row % lines, row // lines
        low, high = int(line.min()), int(line.max()) + 1
        data = read(self.codes, ((low, high), (0, groups)))[line - low, column]
        shifts = (8 // self.count * (self.count - 1 - place)).astype(np.uint8)
        codes = (data >> shifts) & np.uint8((1 << 8 // self.count) - 1)
        scale, zero = (to_float32(read(tensor).reshape(-1)[column]) for tensor in (self.scale, self.zero))
        values = (codes.astype(np.float32) - zero) * scale
        result: np.ndarray = values.reshape(stop - start, self.features)
        return result
