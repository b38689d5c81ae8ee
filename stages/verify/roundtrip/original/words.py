"""compressed-tensors' pack-quantized weights as numbers. Facts: docs/format/quantized-layouts.md, section 9b."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.codes import dequantize, divides_evenly, explicit_groups, unpack_codes
from stages.verify.roundtrip.original.numbers import Numbers
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, read, read_again, to_float32


class PackedWords(Numbers):
    """compressed-tensors' pack-quantized weights: `weight_packed` int32 [out_features, in_features / p], p codes a word.

    `weight_scale` [out_features, groups], [out_features] or one. Codes are unsigned; zero is the middle of the range, or
    `weight_zero_point` int32 [out_features / p, groups], or signed from the middle, int8 [out_features, groups]. Raises BadInput
    for another width than 4 or 8 bits, and groups that do not divide the in-features.
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> None:
        self.tensors = tensors
        words = tensors["weight_packed"].shape[1]
        if "weight_shape" in tensors:
            self.features = int(read(tensors["weight_shape"]).reshape(-1)[-1])
            self.bits = next((bits for bits in (4, 8) if -(-self.features * bits // 32) == words), 0)
        else:
            self.bits = configured_bits(settings)
            self.features = words * 32 // max(self.bits, 1)
        scales = tensors["weight_scale"].shape
        self.groups = math.prod(scales[1:])
        if self.bits not in (4, 8) or len(scales) > 2 or not divides_evenly(self.features, self.groups):
            found = f"{words} words and scales {list(scales)} for {self.features} in-features"
            raise BadInput([Problem(f"{module}.weight_packed", found, "words of 4 or 8 bits, and scales by group")])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["weight_packed"].shape[0], self.features

    def rows(self, start: int, stop: int) -> np.ndarray:
        words, scales = self.tensors["weight_packed"], self._signed(self.tensors["weight_scale"], start, stop)
        codes = unpack_codes(read(words, ((start, stop), (0, words.shape[1]))), self.bits)[:, : self.features]
        return dequantize(codes, self._zeros(start, stop).astype(np.float32), to_float32(scales), self._groups())

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:
        words = self.tensors["weight_packed"]
        if self._groups() is not None or self.features * self.bits % 32:
            return StoredRows(self.rows(start, stop))
        codes = read_again(words, ((start, stop), (0, words.shape[1])), buffers, "stored")
        scales = to_float32(self._signed(self.tensors["weight_scale"], start, stop))
        return StoredRows(
            np.ascontiguousarray(codes).view(np.uint8), self.bits, scales, self._zeros(start, stop).astype(np.float32)
        )

    def _signed(self, tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
        """A scale or zero point that is stored a number a value, of rows [start, stop): [stop - start, groups]."""
        if math.prod(tensor.shape) == 1:
            return np.broadcast_to(read(tensor).reshape(1, 1), (stop - start, 1))
        return read(tensor, ((start, stop), *((0, n) for n in tensor.shape[1:]))).reshape(stop - start, self.groups)

    def _zeros(self, start: int, stop: int) -> np.ndarray:
        """The zero points of rows [start, stop), int16 [stop - start, groups]."""
        groups, zeros = self.groups, self.tensors.get("weight_zero_point")
        if zeros is None:
            return np.full((stop - start, groups), 1 << (self.bits - 1), dtype=np.int16)
        if zeros.dtype.name == "int8":
            return self._signed(zeros, start, stop).astype(np.int16) + np.int16(1 << (self.bits - 1))
        packed = 32 // self.bits
        first, last = start // packed, -(-stop // packed)
        codes = unpack_codes(read(zeros, ((first, last), (0, groups))).T, self.bits).T
        return codes[start - first * packed : stop - first * packed].astype(np.int16)

    def _groups(self) -> np.ndarray | None:
        """The group of each in-feature, int64 [in_features], or None for consecutive ones. A weight_g_idx of -1 has no meaning."""
        if "weight_g_idx" not in self.tensors:
            return None
        index = read(self.tensors["weight_g_idx"]).astype(np.int64)
        valid = index.size == self.features and bool((index >= 0).all())
        return explicit_groups(index, self.groups) if valid else None


def configured_bits(settings: Mapping[str, Any]) -> int:
    """The bits of a code by compressed-tensors' settings; 0 where they name none, or several."""
    schemes = settings.get("config_groups")
    groups = schemes.values() if isinstance(schemes, Mapping) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    said = [each.get("num_bits") for each in weights if isinstance(each, Mapping)]
    widths = {bits if isinstance(bits, int) else 0 for bits in said}
    return widths.pop() if len(widths) == 1 else 0
