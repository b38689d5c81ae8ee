"""Some rows of a source's weight as it stores them: numbers, or codes beside what makes numbers of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.verify.values import Buffers, halves, to_float32


@dataclass(frozen=True)
class StoredRows:
    """(value - zero) * scale of each group of in-features, of some rows.

    `values`: numbers of a floating type [rows, ...], or unsigned codes of `bits` bits, uint8 [rows, in_features * bits / 8], those
    of 4 bits two a byte with the first one low. `scales`, `zeros`: float32 [1 or rows, groups]; None where there are none.
    """

    values: np.ndarray
    bits: int = 0
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None

    @property
    def features(self) -> int:
        """The in-features of a row."""
        width: int = self.values.shape[1]
        return width * 8 // self.bits if self.bits else width

    def columns(self, start: int, stop: int) -> StoredRows:
        """In-features [start, stop) of the rows."""
        if self.scales is None and not self.bits:
            return StoredRows(self.values[:, start:stop])
        groups = 1 if self.scales is None else self.scales.shape[1]
        size = self.features // groups
        if (groups > 1 and (start % size or stop % size)) or (self.bits == 4 and (start % 2 or stop % 2)):
            return StoredRows(self.numbers()[:, start:stop])
        some = slice(None) if groups == 1 else slice(start // size, stop // size)
        scale, zero = (None if each is None else each[:, some] for each in (self.scales, self.zeros))
        codes = slice(start // 2, stop // 2) if self.bits == 4 else slice(start, stop)
        return StoredRows(self.values[:, codes], self.bits, scale, zero)

    def some(self, start: int, stop: int) -> StoredRows:
        """Rows [start, stop) of these."""
        scale, zero = (None if each is None else each if len(each) == 1 else each[start:stop] for each in (self.scales, self.zeros))
        return StoredRows(self.values[start:stop], self.bits, scale, zero)

    def numbers(self, buffers: Buffers | None = None) -> np.ndarray:
        """The numbers, float32 [rows, ...], which must not be changed. `buffers`: to compute in."""
        values = halves(self.values) if self.bits == 4 else self.values
        out = None if buffers is None else buffers.array("expected", values.shape)
        if self.scales is None:
            return to_float32(values, out)
        result = to_float32(values, np.empty(values.shape, np.float32) if out is None else out)
        grouped = result.reshape(len(result), self.scales.shape[1], -1)
        if self.zeros is not None:
            grouped -= self.zeros[:, :, None]
        grouped *= self.scales[:, :, None]
        return result
