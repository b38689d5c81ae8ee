"""A model's weights by Hugging Face's parameter names: the protocols that the round trip and transformers' model read through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from stages.verify.column_words import ColumnWords
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers


class NamedWeights(Protocol):
    """Weights by Hugging Face's parameter names, experts one by one; rows are read when they are asked for."""

    def names(self) -> Sequence[str]:
        """The name of every weight."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight: `[out_features, in_features]` of a matrix, `[features]` of a vector."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a weight's first axis, which must not be changed."""
        ...


class SourceWeights(NamedWeights, Protocol):
    """The weights of a source, which may be packed."""

    def block(self, name: str, start: int, stop: int, buffers: Buffers) -> StoredRows:
        """Rows [start, stop) of a weight, at least one, as they are stored: until the next call with the same buffers."""
        ...

    def columns(self, name: str, start: int, stop: int, features: tuple[int, int]) -> ColumnWords | None:
        """In-features of rows [start, stop) as they are stored, where their codes of 4 bits are packed along columns."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The type of a weight's numbers."""
        ...

    def exact(self, name: str) -> bool:
        """Whether the source stores a weight's numbers themselves, and not codes of them."""
        ...

    def coded(self, name: str) -> bool:
        """Whether the source stores a weight as codes that a rank can keep."""
        ...

    def common_scale(self, name: str) -> float | None:
        """The one scale of all codes that are floats of 8 or 4 bits; None where there is another number of them, or other codes."""
        ...

    def in_columns(self, name: str) -> bool:
        """Whether a weight's codes are packed along columns, and `columns` can say them."""
        ...
