"""Arrays of a source as numbers, rows on demand: as they are stored, a part of a stack, or in another order of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

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
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the rows: float32 for what was packed."""
        return torch.float32

    @property
    def exact(self) -> bool:
        """Whether the source stores these very numbers."""
        return False

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...]: rows of the first axis."""


@dataclass(frozen=True)
class Stored(Numbers):
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
        found: torch.dtype = getattr(torch, self.tensor.dtype.name)  # torch calls each type as NumPy does
        return found

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
class Blocks(Stored):
    """GGUF's packed rows, uint8 [rows, bytes] or [experts, rows, bytes] of type `kind`, by the gguf package's dequantizers."""

    kind: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        import gguf

        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        *front, packed = super().shape
        return (*front, packed // size * elements)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def exact(self) -> bool:
        return False

    def rows(self, start: int, stop: int) -> Tensor:
        import gguf

        packed = self._read(start, stop).numpy()
        values: np.ndarray = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.ascontiguousarray(values))


@dataclass(frozen=True)
class Gathered(Numbers):
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

    def rows(self, start: int, stop: int) -> Tensor:
        wanted, order = self.index(torch.arange(start, stop)).sort()
        cuts = (wanted.diff() > NEAR).nonzero().flatten() + 1
        found = [self.base.rows(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in wanted.tensor_split(cuts)]
        return torch.cat(found)[order.argsort()]

    @abstractmethod
    def index(self, rows: Tensor) -> Tensor:
        """int64 [n]: which rows of `base` the rows of these numbers, int64 [n], are."""


@dataclass(frozen=True)
class Unpermuted(Gathered):
    """Each head's rotary halves one behind the other, of rows where they alternate: Meta's order and llama.cpp's.

    Row (half, i) of a head of Hugging Face is row (i, half) there (checkpoint format, section 3).
    """

    head_size: int

    def index(self, rows: Tensor) -> Tensor:
        inside, half = rows % self.head_size, self.head_size // 2
        return rows - inside + 2 * (inside % half) + inside // half


@dataclass(frozen=True)
class Ungrouped(Gathered):
    """`part` ("q", "k" or "v") of InternLM2's wqkv: `groups` kv heads, of each its G queries, its key and its value.

    Head s of group j begins at row (j * (G + 2) + s) * head_size (families, InternLM2).
    """

    part: str
    groups: int
    head_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.groups * self._heads * self.head_size, *self.base.shape[1:])

    @property
    def _queries(self) -> int:
        return self.base.shape[0] // self.head_size // self.groups - 2

    @property
    def _heads(self) -> int:
        """Of a group's heads, how many are of this part."""
        return self._queries if self.part == "q" else 1

    def index(self, rows: Tensor) -> Tensor:
        head = rows // self.head_size
        slot = head % self._heads + {"q": 0, "k": self._queries, "v": self._queries + 1}[self.part]
        return (head // self._heads * (self._queries + 2) + slot) * self.head_size + rows % self.head_size
