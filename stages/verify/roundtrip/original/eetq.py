"""EETQ's weights as numbers. Facts: docs/format/quantized-layouts.md, section 14."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.kernel_orders import TILE, interleaved, unarrange
from stages.verify.roundtrip.original.numbers import Numbers
from stages.verify.values import read, to_float32

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
        first, last = start // PAIR, -(-stop // PAIR)
        data = read(self.codes, ((first, last), (0, PAIR * self.features)))
        codes = unarrange(data, self.features, 8, "A")[start - PAIR * first : stop - PAIR * first]
        numbers: np.ndarray = codes.astype(np.float32) * to_float32(read(self.scales, ((start, stop),)))[:, None]
        return numbers
