"""GPTQ's and AutoAWQ's weights as numbers. Facts: docs/format/quantized-layouts.md, sections 5, 5b, 6 and 11."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.column_words import ColumnWords, Window
from stages.verify.kernels import checks
from stages.verify.roundtrip.original.codes import (
    LastBlock,
    dequantize,
    divides_evenly,
    explicit_groups,
    unpack_codes,
    unpack_planes,
)
from stages.verify.roundtrip.original.numbers import Numbers
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, halves, read, read_again, to_float32

AHEAD_CODES = 16 << 20  # that are unpacked at once where they are packed along columns
WINDOW_BYTES = 1 << 20  # of packed columns that are read at once
MAPPED_BYTES = 4 << 20  # of the file that hold packed columns which are compared as they lie
RUN = 32  # in-features that are compared at once
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds each of its eight columns
PLACES = np.array(AWQ_PLACES, np.uint8)


def grouped_numbers(module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], last_block: LastBlock) -> Numbers:
    """GPTQ's or AutoAWQ's weight, told apart by the shapes of its tensors. Raises BadInput where these are neither's."""
    (rows, words), (groups, columns) = tensors["qweight"].shape, tensors["scales"].shape
    bits = 32 * tensors["qzeros"].shape[1] // columns if columns and "qzeros" in tensors else 0
    if words == columns and 2 <= bits <= 8 and divides_evenly(rows * 32 // bits, groups):
        return GptqNumbers(module, tensors, bits, settings, last_block)
    said = "qzeros" in tensors or settings.get("zero_point") is False
    if 8 * words == columns and divides_evenly(rows, groups) and said:
        return AwqNumbers(module, tensors, rows, last_block)
    found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    raise BadInput([Problem(f"{module}.qweight", found, "GPTQ's shapes of 2 to 8 bits, or AutoAWQ's gemm")])


def of_module(names: Iterable[str], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of one module: those of all with what GPTQModel's `dynamic` says of it in its first pattern that fits.

    `names`: those that the settings may call it by; the first counts that a pattern fits. What is no table says nothing, nor does a
    pattern that is no expression.
    """
    dynamic = settings.get("dynamic")
    if not isinstance(dynamic, Mapping):
        return settings
    for name in names:
        for pattern, values in dynamic.items():
            signed = pattern[:2] in ("-:", "+:")
            if _fits(pattern[2:] if signed else pattern, name):
                return {**settings, **values} if pattern[:2] != "-:" and isinstance(values, Mapping) else settings
    return settings


def _fits(pattern: str, module: str) -> bool:
    """Whether a module's name begins as an expression says."""
    try:
        return bool(re.match(pattern, module))
    except re.error:
        return False


class UnpackedBlock(NamedTuple):
    """A block of out-features: codes of 4 bits, two a byte, or of 8; and what `dequantize` makes numbers of them with."""

    codes: np.ndarray
    bits: int
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray | None


class GroupedNumbers(Numbers):
    """GPTQ's and AutoAWQ's weights [out_features, in_features]: (code - zero) * scale of each in-feature's group.

    Codes are packed with out-features as columns, p of them a word: `qzeros` int32 [groups, out_features / p], `scales`
    [groups, out_features], `g_idx` int32 [in_features].

    `word_features`, `word_rows`: the in-features and the out-features of a word, of 4 bits each; 0 where codes have others.
    """

    word_features, word_rows = 0, 1

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor], features: int, last_block: LastBlock) -> None:
        self.module, self.tensors, self.features, self.last_block = module, tensors, features, last_block
        self.block_rows = max(AHEAD_CODES // features // 64, 1) * 64  # out-features at once

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["scales"].shape[1], self.features

    def rows(self, start: int, stop: int) -> np.ndarray:
        parts = []
        for first in range(start - start % self.block_rows, stop, self.block_rows):
            last = min(first + self.block_rows, self.shape[0])
            block = self.last_block.get((self.module, first), partial(self._unpacked, first, last))
            some = slice(max(start - first, 0), stop - first)
            codes = halves(block.codes[some]) if block.bits == 4 else block.codes[some]
            parts.append(dequantize(codes, block.zeros[some], block.scales[some], block.groups))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:  # noqa: ARG002
        first = start - start % self.block_rows
        last = min(first + self.block_rows, self.shape[0])
        block = self.last_block.get((self.module, first), partial(self._unpacked, first, last)) if stop <= last else None
        if block is None or block.groups is not None:
            return StoredRows(self.rows(start, stop))
        return StoredRows(block.codes, block.bits, block.scales, block.zeros).some(start - first, stop - first)

    @property
    def in_columns(self) -> bool:
        return self.word_features > 0 and self._index is None

    def columns(self, start: int, stop: int, features: tuple[int, int]) -> ColumnWords | None:
        size = self.features // self.tensors["scales"].shape[0]
        if not self.in_columns or any(each % size for each in features):
            return None
        groups = (features[0] // size, features[1] // size)
        scales = to_float32(read(self.tensors["scales"], (groups, (start, stop))))
        zeros = self.zeros(start, stop)[slice(*groups)].astype(np.float32)
        skip = start % self.word_rows
        some = (start // self.word_rows, -(-stop // self.word_rows))
        order = PLACES if self.word_rows > 1 else None
        return ColumnWords(partial(self._windows, features, some), scales, zeros, order, skip)

    def _windows(self, features: tuple[int, int], columns: tuple[int, int]) -> Iterator[Window]:
        """Columns of the packed codes of some in-features, as many at a time as lie in MAPPED_BYTES of the file."""
        words, each = self.tensors["qweight"], self.word_features
        step = max(MAPPED_BYTES // (words.shape[1] * words.dtype.itemsize) * each // RUN, 1) * RUN
        for at in range(*features, step):
            region = (at // each, min(at + step, features[1]) // each)
            yield Window(at - features[0], read(words, (region, columns)))

    @cached_property
    def _index(self) -> np.ndarray | None:
        """The group of each in-feature, int64 [in_features]; None where groups are consecutive in-features."""
        index = read(self.tensors["g_idx"]).astype(np.int64) if "g_idx" in self.tensors else None
        return explicit_groups(index, self.tensors["scales"].shape[0])

    def _unpacked(self, start: int, stop: int) -> UnpackedBlock:
        groups = self.tensors["scales"].shape[0]
        scales = np.ascontiguousarray(read(self.tensors["scales"], ((0, groups), (start, stop))).T)
        zeros = self.zeros(start, stop).T.astype(np.float32)
        codes, bits = self.codes(start, stop)
        return UnpackedBlock(codes, bits, np.ascontiguousarray(zeros), to_float32(scales), self._index)

    def windows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Columns [start, stop) of the packed codes, an even number of rows at a time: the first row, and int32 [rows, columns]."""
        words, buffers = self.tensors["qweight"], self.last_block.buffers
        step = max(WINDOW_BYTES // ((stop - start) * words.dtype.itemsize) // 2, 1) * 2
        for at in range(0, words.shape[0], step):
            yield at, read_again(words, ((at, min(at + step, words.shape[0])), (start, stop)), buffers, "words")

    @abstractmethod
    def codes(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        """The codes of out-features [start, stop), uint8 [stop - start, in_features * bits / 8], and 4, two a byte, or 8 bits.

        `start` is the first of a block.
        """

    @abstractmethod
    def zeros(self, start: int, stop: int) -> np.ndarray:
        """The zero points of out-features [start, stop), int16 [groups, stop - start]."""


class GptqNumbers(GroupedNumbers):
    """GPTQ: `qweight` int32 [in_features / p, out_features], p = 32 / bits consecutive in-features a word.

    Zero points are stored less one, except in format v2, the planar one, and in those of AutoRound's that are not AutoGPTQ's.
    """

    def __init__(
        self, module: str, tensors: Mapping[str, LazyTensor], bits: int, settings: Mapping[str, Any], last_block: LastBlock
    ) -> None:
        super().__init__(module, tensors, tensors["qweight"].shape[0] * 32 // bits, last_block)
        self.bits = bits
        self.word_features = 8 if bits == 4 else 0
        self.named_v2 = _named_v2(settings)
        self.planar = bits in (5, 6, 7) or (bits == 3 and _said(settings) == "gptq_p")
        self.symmetric = settings.get("sym", True) is not False

    def codes(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        rows = self.last_block.buffers.array("codes", (stop - start, self.tensors["qweight"].shape[0]), np.uint32)
        for at, words in self.windows(start, stop):
            checks.words_as_rows(words, rows[:, at : at + len(words)])
        return (rows.view(np.uint8), self.bits) if self.bits in (4, 8) else (self._codes_of(rows), 8)

    def _codes_of(self, words: np.ndarray) -> np.ndarray:
        """Unpack words, int32 [rows, n], to their codes, uint8 [rows, n * 32 / bits]."""
        return unpack_planes(words, self.bits) if self.planar else unpack_codes(words, self.bits)

    def zeros(self, start: int, stop: int) -> np.ndarray:
        return self._stored_zeros(start, stop).astype(np.int16) + np.int16(0 if self._is_v2 else 1)

    @cached_property
    def _is_v2(self) -> bool:
        """Whether zero points are stored as they are: in format v2, and in files of format v1 that hold v2's zero points.

        A symmetric zero point is the middle of the range: a module that stores just that throughout can only be v2's.
        """
        if self.named_v2 or not self.symmetric:
            return self.named_v2
        return bool((self._stored_zeros(0, self.shape[0]) == 1 << (self.bits - 1)).all())

    def _stored_zeros(self, start: int, stop: int) -> np.ndarray:
        packed = 32 // self.bits
        first, last = start // packed, -(-stop // packed)
        if 32 % self.bits:
            return self._codes_of(read(self.tensors["qzeros"]))[:, start:stop]
        words = read(self.tensors["qzeros"], ((0, self.tensors["qzeros"].shape[0]), (first, last)))
        return unpack_codes(words, self.bits)[:, start - first * packed : stop - first * packed]


def _named_v2(settings: Mapping[str, Any]) -> bool:
    """Whether the settings name a format that stores zero points as they are.

    AutoRound names one itself, in `packing_format` or, in older files, in `backend`: AutoGPTQ's is the default.
    """
    if "round" not in str(settings.get("quant_method")):
        return _said(settings) in ("gptq_v2", "gptq_p")
    names = (str(settings.get(key)).replace("auto-round", "auto_round") for key in ("packing_format", "backend"))
    parts = next((name.split(":") for name in names if name.startswith(("auto_round", "autoround"))), ["", "auto_gptq"])
    return not {"auto_gptq", "gptq"} & set(parts)


def _said(settings: Mapping[str, Any]) -> Any:
    return settings.get("checkpoint_format", settings.get("format"))


class AwqNumbers(GroupedNumbers):
    """AutoAWQ's gemm: `qweight` int32 [in_features, out_features / 8], `qzeros` int32 [groups, out_features / 8].

    A word holds eight out-features, in the order of AWQ_PLACES. Without `qzeros` every zero point is 8, the middle of the range.
    """

    word_features, word_rows = 1, 8

    def codes(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        if self.features % 2:
            return self._columns("qweight", start, stop), 8
        first, last = start // 8, -(-stop // 8)
        codes = self.last_block.buffers.array("codes", (8 * (last - first), self.features // 2), np.uint8)
        for at, words in self.windows(first, last):
            checks.columns_as_rows(words, PLACES, codes[:, at // 2 : (at + len(words)) // 2])
        return codes[start - 8 * first : stop - 8 * first], 4

    def zeros(self, start: int, stop: int) -> np.ndarray:
        groups = self.tensors["scales"].shape[0]
        if "qzeros" not in self.tensors:
            return np.full((groups, stop - start), 8, dtype=np.int16)
        return self._columns("qzeros", start, stop).T.astype(np.int16)

    def _columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns [start, stop) of a packed tensor as rows, uint8 [stop - start, rows]."""
        first, last = start // 8, -(-stop // 8)
        words = np.ascontiguousarray(read(self.tensors[name], ((0, self.tensors[name].shape[0]), (first, last))).T).view(np.uint32)
        nibbles = np.empty((last - first, 8, words.shape[1]), np.uint8)
        for column, place in enumerate(AWQ_PLACES):
            nibbles[:, column] = words >> np.uint32(4 * place) & np.uint32(15)
        return nibbles.reshape(-1, words.shape[1])[start - 8 * first : stop - 8 * first]
