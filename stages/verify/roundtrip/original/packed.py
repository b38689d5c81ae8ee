"""The packed formats of quantized sources as numbers, module by module.

Facts: quantized layouts, sections 5 to 7 and 9b, written down here anew and by no code of stages/quantization.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.numbers import Blocks, Numbers, Stored
from stages.verify.values import read

AHEAD_BYTES = 8 << 20  # of codes, uint8, that are unpacked at once where they are packed along columns
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds each of its eight columns
GGUF = "gguf_"
# What else modules of quantized sources hold: of activations and of the cache, no weights.
BESIDE = ("input_scale", "input_scale_ub", "output_scale", "q_scale", "k_scale", "v_scale")
# By format, what its numbers are made of.
GROUPED = ("qweight", "qzeros", "scales", "g_idx")
WORDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
SCALED = ("weight", "weight_scale", "weight_zero_point", "pre_quant_scale")


class Memo(threading.local):
    """The last block that was unpacked, of whichever module; each thread has its own."""

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor] | None = None

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The value of `key`, made unless it is the last one."""
        if self._last is None or self._last[0] != key:
            self._last = None  # not two blocks at once
            self._last = (key, make())
        return self._last[1]


def unpack(module: str, parameters: Mapping[str, LazyTensor], settings: Mapping[str, Any], memo: Memo) -> dict[str, Numbers]:
    """A module's parameters as numbers: `weight` of whatever its weight is packed as, and those that are not packed.

    Raises BadInput naming the module's tensor that no format explains.
    """
    rest = {name: tensor for name, tensor in parameters.items() if name not in BESIDE}
    packed: Numbers | None = None
    kind = next((name for name in rest if name.startswith(GGUF)), None)
    if kind:
        packed = Blocks(rest.pop(kind), kind=kind.removeprefix(GGUF))
    elif set(GROUPED[:3]) <= rest.keys():
        packed = _grouped(module, _taken(rest, GROUPED), settings, memo)
    elif "weight_packed" in rest:
        packed = Words(module, _taken(rest, WORDS), settings)
    elif {"weight", "weight_scale"} <= rest.keys():
        packed = _scaled(module, _taken(rest, SCALED))
    numbers: dict[str, Numbers] = {name: Stored(tensor) for name, tensor in rest.items()}
    for name, tensor in rest.items():
        if not Stored(tensor).dtype.is_floating_point:
            found = f"values of type {tensor.dtype}, {list(tensor.shape)}, beside {', '.join(sorted(parameters))}"
            raise BadInput([Problem(f"{module}.{name}", found, "numbers, or a packed format that headrace reads")])
    return numbers if packed is None else {**numbers, "weight": packed}


def _taken(parameters: dict[str, LazyTensor], names: tuple[str, ...]) -> dict[str, LazyTensor]:
    return {name: parameters.pop(name) for name in names if name in parameters}


def unpacked(words: Tensor, bits: int) -> Tensor:
    """uint8 [..., n * 32 / bits] of 32-bit words [..., n]: the codes of each, lowest bits first."""
    data = _bytes(words)
    return data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)


def _bytes(words: Tensor) -> Tensor:
    """uint8 [..., 4 n] of 32-bit words [..., n], the lowest first."""
    # Not contiguous(), which leaves the strides of axes of length 1 as they are.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def dequantized(codes: Tensor, zeros: Tensor, scales: Tensor, index: Tensor | None) -> Tensor:
    """float32 [n, K]: (code - zero) * scale of each in-feature's group.

    Codes uint8 [n, K]; zeros and scales float32 [n, G]; `index` int64 [K], or None where groups are consecutive in-features.
    """
    if index is not None:
        return (codes.float() - zeros[:, index]) * scales[:, index]
    by_group = codes.reshape(len(codes), zeros.shape[1], -1).float()
    return (by_group.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))).reshape(codes.shape)


class Grouped(Numbers):
    """GPTQ's and AutoAWQ's weights: (code - zero) * scale of each in-feature's group, codes packed with out-features as columns.

    qzeros int32 [G, N / p], scales [G, N], g_idx int32 [K].
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor], features: int, memo: Memo) -> None:
        self.module, self.tensors, self.features, self.memo = module, tensors, features, memo
        self.block = max(AHEAD_BYTES // features // 64, 1) * 64  # out-features at once

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["scales"].shape[1], self.features

    def rows(self, start: int, stop: int) -> Tensor:
        found = []
        for first in range(start - start % self.block, stop, self.block):
            last = min(first + self.block, self.shape[0])
            codes = self.memo.get((self.module, first), partial(self.codes, first, last))
            found.append(codes[max(start - first, 0) : stop - first])
        groups = self.tensors["scales"].shape[0]
        scales = read(self.tensors["scales"], ((0, groups), (start, stop))).float()
        index = read(self.tensors["g_idx"]).long() if "g_idx" in self.tensors else None
        return dequantized(torch.cat(found), self.zeros(start, stop).T.float(), scales.T, _unless_trivial(index, groups))

    @abstractmethod
    def codes(self, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, K]; `start` is the first out-feature of a word."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> Tensor:
        """int16 [G, stop - start]."""


class Gptq(Grouped):
    """qweight int32 [K / p, N], p = 32 / bits consecutive in-features a word; zeros less one, but of format v2."""

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor], bits: int, settings: Mapping[str, Any], memo: Memo) -> None:
        super().__init__(module, tensors, tensors["qweight"].shape[0] * 32 // bits, memo)
        self.bits = bits
        self.said_second = settings.get("checkpoint_format") == "gptq_v2"
        self.symmetric = settings.get("sym", True) is not False

    def codes(self, start: int, stop: int) -> Tensor:
        words = read(self.tensors["qweight"], ((0, self.tensors["qweight"].shape[0]), (start, stop)))
        return unpacked(words.T, self.bits)

    def zeros(self, start: int, stop: int) -> Tensor:
        return self._stored_zeros(start, stop).to(torch.int16) + (0 if self._second else 1)

    @cached_property
    def _second(self) -> bool:
        """Whether zeros are stored as they are: format v2, and files of the first that hold the zeros of the second.

        A symmetric zero is the middle of the range. Stored as that itself, throughout a module, it can only be the second's.
        """
        if self.said_second or not self.symmetric:
            return self.said_second
        return bool((self._stored_zeros(0, self.shape[0]) == 1 << (self.bits - 1)).all())

    def _stored_zeros(self, start: int, stop: int) -> Tensor:
        packed = 32 // self.bits
        first, last = start // packed, -(-stop // packed)
        words = read(self.tensors["qzeros"], ((0, self.tensors["qzeros"].shape[0]), (first, last)))
        return unpacked(words, self.bits)[:, start - first * packed : stop - first * packed]


class Awq(Grouped):
    """AutoAWQ's gemm: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], eight columns a word in an order of their own."""

    def codes(self, start: int, stop: int) -> Tensor:
        return self._columns("qweight", start, stop)

    def zeros(self, start: int, stop: int) -> Tensor:
        return self._columns("qzeros", start, stop).T.to(torch.int16)

    def _columns(self, name: str, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, rows]: some columns of a packed tensor as rows."""
        first, last = start // 8, -(-stop // 8)
        words = read(self.tensors[name], ((0, self.tensors[name].shape[0]), (first, last)))
        data = _bytes(words.T).reshape(last - first, -1, 4)
        nibbles = torch.stack([(data[..., place // 2] >> (4 * (place % 2))) & 15 for place in AWQ_PLACES], 1)
        return nibbles.flatten(0, 1)[start - 8 * first : stop - 8 * first]


def _grouped(module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], memo: Memo) -> Numbers:
    (rows, words), (groups, columns) = tensors["qweight"].shape, tensors["scales"].shape
    bits = 32 * tensors["qzeros"].shape[1] // columns if columns else 0
    if words == columns and bits in (4, 8) and _even(rows * 32 // bits, groups):
        return Gptq(module, tensors, bits, settings, memo)
    if 8 * words == columns and _even(rows, groups):
        return Awq(module, tensors, rows, memo)
    found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    raise BadInput([Problem(f"{module}.qweight", found, "GPTQ's shapes of 4 or 8 bits, or AutoAWQ's gemm")])


def _even(features: int, groups: int) -> bool:
    return bool(groups) and not features % groups


class Words(Numbers):
    """compressed-tensors' pack-quantized weights: weight_packed int32 [N, K / p], consecutive in-features a word.

    weight_scale [N, G]; codes are unsigned, with the middle of the range as zero, or weight_zero_point int32 [N / p, G].
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> None:
        self.tensors = tensors
        words = tensors["weight_packed"].shape[1]
        if "weight_shape" in tensors:
            self.features = int(read(tensors["weight_shape"]).reshape(-1)[-1])
            self.bits = next((bits for bits in (4, 8) if -(-self.features * bits // 32) == words), 0)
        else:
            self.bits = _said_bits(settings)
            self.features = words * 32 // max(self.bits, 1)
        scales = tensors["weight_scale"].shape
        if self.bits not in (4, 8) or len(scales) != 2 or not _even(self.features, scales[1]):
            found = f"{words} words and scales {list(scales)} for {self.features} in-features"
            raise BadInput([Problem(f"{module}.weight_packed", found, "words of 4 or 8 bits, and scales by group")])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["weight_packed"].shape[0], self.features

    def rows(self, start: int, stop: int) -> Tensor:
        words, scales = self.tensors["weight_packed"], self.tensors["weight_scale"]
        codes = unpacked(read(words, ((start, stop), (0, words.shape[1]))), self.bits)[:, : self.features]
        by_group = read(scales, ((start, stop), (0, scales.shape[1]))).float()
        return dequantized(codes, self._zeros(start, stop).float(), by_group, self._groups())

    def _zeros(self, start: int, stop: int) -> Tensor:
        """int16 [stop - start, G]."""
        groups, zeros = self.tensors["weight_scale"].shape[1], self.tensors.get("weight_zero_point")
        if zeros is None:
            return torch.full((stop - start, groups), 1 << (self.bits - 1), dtype=torch.int16)
        packed = 32 // self.bits
        first, last = start // packed, -(-stop // packed)
        codes = unpacked(read(zeros, ((first, last), (0, groups))).T, self.bits).T
        return codes[start - first * packed : stop - first * packed].to(torch.int16)

    def _groups(self) -> Tensor | None:
        """int64 [K], or None for consecutive in-features. A weight_g_idx of -1 says nothing."""
        if "weight_g_idx" not in self.tensors:
            return None
        index = read(self.tensors["weight_g_idx"]).long()
        said = index.numel() == self.features and bool((index >= 0).all())
        return _unless_trivial(index, self.tensors["weight_scale"].shape[1]) if said else None


def _unless_trivial(index: Tensor | None, groups: int) -> Tensor | None:
    """The group of each in-feature; None where these are consecutive."""
    if index is None or torch.equal(index, torch.arange(len(index)) // (len(index) // groups)):
        return None
    return index


def _said_bits(settings: Mapping[str, Any]) -> int:
    """The width that compressed-tensors' settings say; 0 where they say none, or several."""
    schemes = settings.get("config_groups")
    groups = schemes.values() if isinstance(schemes, Mapping) else ()
    said = {group["weights"].get("num_bits") for group in groups if isinstance(group, Mapping) and group.get("weights")}
    bits = said.pop() if len(said) == 1 else 0
    return bits if isinstance(bits, int) else 0


@dataclass(frozen=True)
class Scaled(Numbers):
    """weight * weight_scale, of float8 or int8 [N, K]: one scale, or [N] or [N, 1] or [N, G]; pre_quant_scale [K] folded in.

    `pairs`: ModelOpt's int4, uint8 [N / 2, K], row 2 i in the low half of a byte, row 2 i + 1 in the high one, two's complement.
    """

    tensors: Mapping[str, LazyTensor]
    pairs: bool

    @property
    def shape(self) -> tuple[int, ...]:
        out, features = self.tensors["weight"].shape
        return (2 * out if self.pairs else out), features

    def rows(self, start: int, stop: int) -> Tensor:
        codes = self._paired(start, stop) if self.pairs else Stored(self.tensors["weight"]).rows(start, stop)
        values = codes.float()
        if "weight_zero_point" in self.tensors:
            values = values - self._spread("weight_zero_point", start, stop)
        values = values * self._spread("weight_scale", start, stop)
        before = self.tensors.get("pre_quant_scale")
        return values if before is None else values * read(before).float().reshape(1, -1)

    def _spread(self, name: str, start: int, stop: int) -> Tensor:
        """float32, of a shape that rows [start, stop) can be combined with."""
        tensor, (out, features) = self.tensors[name], self.shape
        count = math.prod(tensor.shape)
        if count == 1 and out > 1:
            return read(tensor).float().reshape(1, 1)
        rows = Stored(tensor).rows(start, stop).float().reshape(stop - start, -1)
        return rows if count == out else rows.repeat_interleave(features * out // count, 1)

    def _paired(self, start: int, stop: int) -> Tensor:
        first, last = start // 2, -(-stop // 2)
        data = Stored(self.tensors["weight"]).rows(first, last)
        both = torch.stack([data & 15, data >> 4], 1).reshape(-1, data.shape[1]).to(torch.int8)
        return ((both ^ 8) - 8)[start - 2 * first : stop - 2 * first]


def _scaled(module: str, tensors: Mapping[str, LazyTensor]) -> Numbers:
    weight = tensors["weight"]
    kind = weight.dtype.name
    if len(weight.shape) != 2 or kind not in ("float8_e4m3fn", "int8", "uint8"):
        found = f"a weight_scale beside values of type {kind}, {list(weight.shape)}"
        raise BadInput([Problem(f"{module}.weight", found, "a matrix of float8_e4m3fn, int8, or pairs of int4 in uint8")])
    numbers = Scaled(tensors, kind == "uint8")
    out, features = numbers.shape
    for name in ("weight_scale", "weight_zero_point"):
        shape = tensors[name].shape if name in tensors else ()
        one = math.prod(shape) == 1
        if not one and not (shape and shape[0] == out and len(shape) <= 2 and _even(features, math.prod(shape[1:]))):
            expected = f"one scale, or one for each of {out} out-features, or groups of their {features} in-features"
            raise BadInput([Problem(f"{module}.{name}", f"shape {list(shape)}", expected)])
    return numbers
