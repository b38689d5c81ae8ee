"""Weights of a source as numbers, rows on demand: as they are stored, a part of a stack, or with rows in another order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import gguf
import numpy as np
import torch
from torch import Tensor

from pipeline.tensor.tensors import LazyTensor
from stages.verify.values import read

NEAR = 2  # rows that are so close to one another are read as one run: the interleaved halves of a head


class Numbers(ABC):
    """A weight [rows, ...] whose rows are read when they are asked for."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers: [out_features, in_features] of a matrix."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the rows: float32 for what was packed."""
        return torch.float32

    @property
    def exact(self) -> bool:
        """Whether the source stores these very numbers."""
        return False

    @property
    def coded(self) -> bool:
        """Whether the source stores codes that a rank can keep: not those of blocks, which are made numbers in any case."""
        return not self.exact

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first axis: [stop - start, ...] of type `dtype`."""


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
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.tensor.dtype.name)  # torch calls each type as NumPy does
        return dtype

    @property
    def exact(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> Tensor:
        return self._read(start, stop)

    def part(self, expert: int, first: int, count: int) -> Self:
        """Rows `first` to `first + count` of matrix `expert`, of a stack [experts, rows, columns]."""
        return replace(self, front=(expert,), first=first, count=count)

    def _read(self, start: int, stop: int) -> Tensor:
        matrices = tuple((index, index + 1) for index in self.front)
        rest = self.tensor.shape[len(self.front) + 1 :]
        region = (*matrices, (self.first + start, self.first + stop), *((0, length) for length in rest))
        return read(self.tensor, region).reshape(stop - start, *rest)


@dataclass(frozen=True)
class GgufNumbers(StoredNumbers):
    """GGUF's packed rows as float32: uint8 [rows, bytes] or [experts, rows, bytes] of GGUF's type `kind`, dequantized by gguf."""

    kind: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        *front, packed = super().shape
        return (*front, packed // size * elements)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def exact(self) -> bool:
        return False

    @property
    def coded(self) -> bool:
        return False

    def rows(self, start: int, stop: int) -> Tensor:
        packed = self._read(start, stop).numpy()
        values: np.ndarray = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.ascontiguousarray(values))


@dataclass(frozen=True)
class ReorderedNumbers(Numbers):
    """`base` with its rows in another order, or some of them."""

    base: Numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def exact(self) -> bool:
        return self.base.exact

    @property
    def coded(self) -> bool:
        return self.base.coded

    def rows(self, start: int, stop: int) -> Tensor:
        base_rows, order = self.index(torch.arange(start, stop)).sort()
        cuts = (base_rows.diff() > NEAR).nonzero().flatten() + 1
        runs = [self.base.rows(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in base_rows.tensor_split(cuts)]
        return torch.cat(runs)[order.argsort()]

    @abstractmethod
    def index(self, rows: Tensor) -> Tensor:
        """The rows of `base`, int64 [n], that some rows of these numbers, int64 [n], are."""


@dataclass(frozen=True)
class Unpermuted(ReorderedNumbers):
    """Heads with their rotary halves one behind the other, of rows where the halves alternate: Meta's and llama.cpp's order.

    Row (half, i) of a head in Hugging Face's order is row (i, half) in theirs (docs/format/checkpoint.md, section 3).
    """

    head_size: int

    def index(self, rows: Tensor) -> Tensor:
        inside, half = rows % self.head_size, self.head_size // 2
        return rows - inside + 2 * (inside % half) + inside // half


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

    def index(self, rows: Tensor) -> Tensor:
        head = rows // self.head_size
        slot = head % self._heads + {"q": 0, "k": self._queries, "v": self._queries + 1}[self.part]
        return (head // self._heads * (self._queries + 2) + slot) * self.head_size + rows % self.head_size
