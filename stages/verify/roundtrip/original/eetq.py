"""EETQ's weights as numbers. Facts: docs/format/quantized-layouts.md, section 14."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.kernel_orders import TILE, interleaved, unarrange
from stages.verify.roundtrip.original.numbers import Numbers
from stages.verify.rows import StoredRows
from stages.verify.values import Buffers, read, to_float32

PARAMETERS = ("weight", "qweight", "weight_scales")
PAIR = interleaved(8, "A")


class EetqNumbers(Numbers):
    """Codes in order A, int8 [in_features, out_features] as a run of bytes, times the scale of the row.

    Raises BadInput where these are not of one another's shape.
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor]) -> None:
        weight: Any = tensors.get("weight", tensors.get("qweight"))
        self.scales, shape = tensors["weight_scales"], tuple(weight.shape) if weight is not None else ()
        if len(shape) != 2 or weight.dtype.name != "int8" or self.scales.shape != shape[1:] or shape[0] % TILE or shape[1] % PAIR:
            found = f"{getattr(weight, 'dtype', 'no weight')} {list(shape)} and scales {list(self.scales.shape)}"
            expected = "int8 [in-features, out-features] in whole tiles, and a scale a row"
            raise BadInput([Problem(f"{module}.weight", found, expected)])
        self.features, self.out = shape
        self.codes: LazyTensor = weight.viewed((self.out // PAIR, PAIR * self.features), np.dtype(np.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out, self.features

    def rows(self, start: int, stop: int) -> np.ndarray:
        numbers: np.ndarray = self._codes(start, stop).astype(np.float32) * self._scales(start, stop)
        return numbers

    def block(self, start: int, stop: int, buffers: Buffers) -> StoredRows:  # noqa: ARG002
        scales, codes = self._scales(start, stop), self._codes(start, stop).view(np.uint8) ^ np.uint8(0x80)
        return StoredRows(codes, 8, scales, np.full(scales.shape, 128, np.float32))

    def _codes(self, start: int, stop: int) -> np.ndarray:
        """The codes of rows [start, stop), int8 [stop - start, in_features]."""
        first, last = start // PAIR, -(-stop // PAIR)
        data = read(self.codes, ((first, last), (0, PAIR * self.features)))
        return unarrange(data, self.features, 8, "A")[start - PAIR * first : stop - PAIR * first]

    def _scales(self, start: int, stop: int) -> np.ndarray:
        return to_float32(read(self.scales, ((start, stop),)))[:, None]
