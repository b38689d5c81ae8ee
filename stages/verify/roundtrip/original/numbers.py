"""Weights of a source as numbers, rows on demand: as they are stored, a part of a stack, or with rows in another order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from pipeline.tensor.tensors import LazyTensor
from stages.verify.column_words import ColumnWords
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, read, read_again, to_float32

FLOAT32 = np.dtype(np.float32)
NEAR = 2  # rows that are so close to one another are read as one run: the interleaved halves of a head


class Numbers(ABC):
    """A weight [rows, ...] whose rows are read when they are asked for."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers: [out_features, in_features] of a matrix."""

    @property
    def dtype(self) -> np.dtype:
        """The type of the rows: float32 for what was packed."""
        return FLOAT32

    @property
    def exact(self) -> bool:
        """Whether the source stores these very numbers."""
        return False

    @property
    def coded(self) -> bool:
        """Whether the source stores codes that a rank can keep: not those of blocks, which are made numbers in any case."""
        return not self.exact

    @property
    def common_scale(self) -> float | None:
        """The one scale of all, of codes that are floats of 8 or 4 bits; None for other codes, and where there are several scales.

        Groups of 4-bit floats have scales of their own beside it.
        """
        return None

    @property
    def in_columns(self) -> bool:
        """Whether codes of 4 bits are packed along columns, and `columns` can say them."""
        return False

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the first axis: [stop - start, ...] of type `dtype`, which must not be changed."""

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:  # noqa: ARG002
        """The same rows as they are stored, where `StoredRows` can say it; good until the next call with `buffers`."""
        return StoredRows(self.rows(start, stop))

    def columns(self, start: int, stop: int, features: tuple[int, int]) -> ColumnWords | None:  # noqa: ARG002
        """In-features [features) of rows [start, stop) as they are stored along columns; None where `ColumnWords` cannot say it."""
        return None


@dataclass(frozen=True)
class StoredNumbers(Numbers):
    """A tensor as it is; or, with `front`, rows `first` to `first + count` of one matrix of a stack."""

    tensor: LazyTensor
    front: tuple[int, ...] = ()
    first: int = 0
    count: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape[len(self.front) :]
        return shape if self.count is None else (self.count, *shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def exact(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._read(start, stop)

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:
        return StoredRows(self._read(start, stop, buffers))

    def part(self, expert: int, first: int, count: int) -> Self:
        """Rows `first` to `first + count` of matrix `expert`, of a stack [experts, rows, columns]."""
        return replace(self, front=(expert,), first=first, count=count)

    def _read(self, start: int, stop: int, buffers: Buffers | None = None) -> np.ndarray:
        matrices = tuple((index, index + 1) for index in self.front)
        rest = tuple((0, length) for length in self.tensor.shape[len(self.front) + 1 :])
        region = (*matrices, (self.first + start, self.first + stop), *rest)
        values = read(self.tensor, region) if buffers is None else read_again(self.tensor, region, buffers, "stored")
        return values.reshape(stop - start, *self.tensor.shape[len(self.front) + 1 :])


@dataclass(frozen=True)
class GgufNumbers(StoredNumbers):
    """GGUF's packed rows as float32: uint8 [rows, bytes] or [experts, rows, bytes] of GGUF's type `kind`, dequantized by gguf."""

    kind: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        elements, size, _ = self._block
        *front, packed = super().shape
        return (*front, packed // size * elements)

    @property
    def dtype(self) -> np.dtype:
        return FLOAT32

    @property
    def exact(self) -> bool:
        return False

    @property
    def coded(self) -> bool:
        return False

    def rows(self, start: int, stop: int) -> np.ndarray:
        from gguf.quants import dequantize

        values: np.ndarray = dequantize(np.ascontiguousarray(self._read(start, stop)), self._block[2])
        return values

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:  # noqa: ARG002
        return StoredRows(self.rows(start, stop))

    @property
    def _block(self) -> tuple[int, int, Any]:
        """The elements of a block, its bytes, and GGUF's type."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType[self.kind]
        return (*GGML_QUANT_SIZES[kind], kind)


@dataclass(frozen=True)
class ReorderedNumbers(Numbers):
    """`base` with its rows in another order, or some of them."""

    base: Numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def exact(self) -> bool:
        return self.base.exact

    @property
    def coded(self) -> bool:
        return self.base.coded

    @property
    def common_scale(self) -> float | None:
        return self.base.common_scale

    def rows(self, start: int, stop: int) -> np.ndarray:
        base_rows = self.index(np.arange(start, stop))
        order = np.argsort(base_rows, kind="stable")
        base_rows = base_rows[order]
        cuts = np.flatnonzero(np.diff(base_rows) > NEAR) + 1
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for places, run in zip(np.split(order, cuts), np.split(base_rows, cuts), strict=True):
            result[places] = self.base.rows(int(run[0]), int(run[-1]) + 1)[run - run[0]]
        return result

    @abstractmethod
    def index(self, rows: np.ndarray) -> np.ndarray:
        """The rows of `base`, int64 [n], that some rows of these numbers, int64 [n], are."""


@dataclass(frozen=True)
class Unpermuted(ReorderedNumbers):
    """Heads with their rotary halves one behind the other, of rows where the halves alternate: Meta's and llama.cpp's order.

    Row (half, i) of a head in Hugging Face's order is row (i, half) in theirs (docs/format/checkpoint.md, section 3).
    """

    head_size: int

    def index(self, rows: np.ndarray) -> np.ndarray:
        inside, half = rows % self.head_size, self.head_size // 2
        result: np.ndarray = rows - inside + 2 * (inside % half) + inside // half
        return result


@dataclass(frozen=True)
class SomeRows(ReorderedNumbers):
    """`count` rows of a tensor that holds several weights one behind the other, from row `first` on."""

    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.base.shape[1:])

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:
        return self.base.block(self.first + start, self.first + stop, buffers)

    def index(self, rows: np.ndarray) -> np.ndarray:
        result: np.ndarray = rows + self.first
        return result


@dataclass(frozen=True)
class UnitRows(Numbers):
    """`base` [rows, in] with each row divided by its length, as float32: Baichuan 2's head."""

    base: Numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def exact(self) -> bool:
        return self.base.exact

    @property
    def coded(self) -> bool:
        return False

    def rows(self, start: int, stop: int) -> np.ndarray:
        values = to_float32(self.base.rows(start, stop))
        lengths = np.sqrt(np.square(values).sum(-1, keepdims=True))
        result: np.ndarray = values / np.maximum(lengths, np.float32(1e-12))
        return result


@dataclass(frozen=True)
class Ungrouped(ReorderedNumbers):
    """The rows of `part` ("q", "k" or "v") of InternLM2's wqkv, which has `groups` groups of Q query heads, a key and a value head.

    Head s of group j begins at row (j * (Q + 2) + s) * head_size (docs/format/families.md, section 8).
    """

    part: str
    groups: int
    head_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups * self._heads * self.head_size, *self.base.shape[1:])

    @property
    def _queries(self) -> int:
        """The number of a group's query heads."""
        return self.base.shape[0] // self.head_size // self.groups - 2

    @property
    def _heads(self) -> int:
        """The number of a group's heads that are of this part."""
        return self._queries if self.part == "q" else 1

    def index(self, rows: np.ndarray) -> np.ndarray:
        head = rows // self.head_size
        slot = head % self._heads + {"q": 0, "k": self._queries, "v": self._queries + 1}[self.part]
        result: np.ndarray = (head // self._heads * (self._queries + 2) + slot) * self.head_size + rows % self.head_size
        return result
