"""Weights of float8 or small integers beside their scales, as numbers. Facts: docs/format/quantized-layouts.md, sections 5 to 7."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.codes import divides_evenly
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, read, signed_pairs, to_float32


def scaled_numbers(module: str, tensors: Mapping[str, LazyTensor]) -> Numbers:
    """The weight of a module with a weight_scale. Raises BadInput for values or scales of another type or shape."""
    weight = tensors["weight"]
    kind = weight.dtype.name
    if len(weight.shape) != 2 or kind not in ("float8_e4m3fn", "int8", "uint8"):
        found = f"a weight_scale beside values of type {kind}, {list(weight.shape)}"
        raise BadInput([Problem(f"{module}.weight", found, "a matrix of float8_e4m3fn, int8, or pairs of int4 in uint8")])
    numbers = ScaledNumbers(tensors, kind == "uint8")
    out, features = numbers.shape
    for name in ("weight_scale", "weight_zero_point"):
        shape = tensors[name].shape if name in tensors else ()
        one = math.prod(shape) == 1
        if not one and not (shape and shape[0] == out and len(shape) <= 2 and divides_evenly(features, math.prod(shape[1:]))):
            expected = f"one scale, or one for each of {out} out-features, or groups of their {features} in-features"
            raise BadInput([Problem(f"{module}.{name}", f"shape {list(shape)}", expected)])
    return numbers


@dataclass(frozen=True)
class ScaledNumbers(Numbers):
    """weight * weight_scale, of float8 or int8 [out_features, in_features]; `pre_quant_scale` [in_features] is multiplied in.

    `weight_scale`: one value, or [out_features], [out_features, 1] or [out_features, groups], whose groups are consecutive
    in-features, or those that `weight_g_idx` [in_features] names. `pairs`: ModelOpt's int4, uint8
    [out_features / 2, in_features] with row 2 i in the low half of a byte and row 2 i + 1 in the high one, in two's complement.
    """

    tensors: Mapping[str, LazyTensor]
    pairs: bool

    @property
    def shape(self) -> tuple[int, ...]:
        out, features = self.tensors["weight"].shape
        return (2 * out if self.pairs else out), features

    @property
    def common_scale(self) -> float | None:
        alone = math.prod(self.tensors["weight_scale"].shape) == 1 and "pre_quant_scale" not in self.tensors
        return float(to_float32(read(self.tensors["weight_scale"])).reshape(-1)[0]) if alone and self._small_floats else None

    @property
    def _small_floats(self) -> bool:
        return bool(self.tensors["weight"].dtype.name == "float8_e4m3fn")

    def rows(self, start: int, stop: int) -> np.ndarray:
        stored = StoredNumbers(self.tensors["weight"])
        values = to_float32(self._paired(start, stop) if self.pairs else stored.rows(start, stop))
        if "weight_zero_point" in self.tensors:
            values -= self._spread("weight_zero_point", start, stop)
        values *= self._spread("weight_scale", start, stop)
        smooth = self.tensors.get("pre_quant_scale")
        if smooth is not None:
            values *= to_float32(read(smooth)).reshape(1, -1)
        return values

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:
        if self.pairs or {"weight_g_idx", "pre_quant_scale"} & self.tensors.keys():
            return StoredRows(self.rows(start, stop))
        stored = StoredNumbers(self.tensors["weight"]).block(start, stop, buffers)
        scales = self._grouped("weight_scale", start, stop)
        if self._small_floats:
            plain = scales.shape[1] == 1 and "weight_zero_point" not in self.tensors
            return replace(stored, scales=scales) if plain else StoredRows(self.rows(start, stop))
        zeros = np.full(scales.shape, 128, np.float32)
        if "weight_zero_point" in self.tensors:
            points = self._grouped("weight_zero_point", start, stop)
            if points.shape[1] != scales.shape[1]:
                return StoredRows(self.rows(start, stop))
            zeros = zeros + points
        codes = buffers.array("codes", stored.values.shape, np.uint8)
        np.bitwise_xor(stored.values.view(np.uint8), np.uint8(0x80), out=codes)  # signed codes, made unsigned
        return StoredRows(codes, 8, scales, zeros)

    def _grouped(self, name: str, start: int, stop: int) -> np.ndarray:
        """A scale or zero point of rows [start, stop), one for each group: float32 [1 or rows, groups]."""
        tensor, (out, _) = self.tensors[name], self.shape
        if math.prod(tensor.shape) == 1 and out > 1:
            return to_float32(read(tensor)).reshape(1, 1)
        return to_float32(StoredNumbers(tensor).rows(start, stop)).reshape(stop - start, -1)

    def _spread(self, name: str, start: int, stop: int) -> np.ndarray:
        """A scale or zero point of rows [start, stop): float32 [1 or rows, 1 or in_features]."""
        tensor, (out, features) = self.tensors[name], self.shape
        count = math.prod(tensor.shape)
        rows = self._grouped(name, start, stop)
        if count in (1, out):
            return rows
        index = read(self.tensors["weight_g_idx"]).astype(np.int64) if "weight_g_idx" in self.tensors else None
        ordered = index is not None and index.size == features and bool((index >= 0).all())
        return rows[:, index] if ordered else np.repeat(rows, features * out // count, axis=1)

    def _paired(self, start: int, stop: int) -> np.ndarray:
        """The codes of rows [start, stop) of ModelOpt's int4: int8 [stop - start, in_features]."""
        first, last = start // 2, -(-stop // 2)
        data = StoredNumbers(self.tensors["weight"]).rows(first, last)
        return signed_pairs(data)[start - 2 * first : stop - 2 * first]
