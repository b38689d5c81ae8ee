"""Some rows of a source's weight whose codes are packed along columns, as the source stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """The words of some in-features, as ColumnWords has them; `start`: the first of these, of those that the ColumnWords are of."""

    start: int
    words: np.ndarray


@dataclass(frozen=True)
class ColumnWords:
    """(code - zero) * scale of each group of in-features, of some rows.

    `windows`: reads the codes of 4 bits, some in-features at a time: int32 [in_features / 8, rows], a word of eight in-features of
    a row, the first one low. With `order`: int32 [in_features, n], a word of eight rows, each in the nibble that `order`, uint8
    [8], names; the first `skip` rows are none of these. `scales`, `zeros`: float32 [groups, rows].
    """

    windows: Callable[[], Iterator[Window]]
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray | None = None
    skip: int = 0
