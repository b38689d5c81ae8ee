"""bitsandbytes' weights as numbers. Facts: docs/format/quantized-layouts.md, section 9c."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.documents import parse_json
from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers
from stages.verify.values import halves, read, to_float32

STATE = "weight.quant_state.bitsandbytes__"
STATE_BYTES = 64 << 10


class FourBitNumbers(Numbers):
    """The value of a code times the scale of its run. A byte of `weight` holds two codes of the flat matrix, the first above.

    Raises BadInput where the state says no shape, or the tensors are of other lengths.
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = tensors
        name = next(name for name in tensors if name.startswith(STATE))
        try:
            self.state: dict[str, Any] = parse_json(bytes(read(tensors[name]).tolist())) if _is_short(tensors[name]) else {}
            rows, columns = self.state["shape"]
            sound = tensors["weight"].shape[0] * 2 == rows * columns and not columns % self.state["blocksize"]
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            sound = False
        if not sound:
            raise BadInput([Problem(f"{module}.{name}", "no shape that fits the weight", "a state of bitsandbytes")])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    def rows(self, start: int, stop: int) -> np.ndarray:
        width, size = self.shape[1], self.state["blocksize"]
        data = read(self.tensors["weight"], ((start * width // 2, -(-stop * width // 2)), (0, 1))).reshape(-1)
        codes = halves(data, high_first=True)[start * width % 2 :][: (stop - start) * width]
        values: np.ndarray = self._table("weight.quant_map")[codes].reshape(-1, size)
        values *= self._scales(start * width // size, stop * width // size)[:, None]
        return values.reshape(-1, width)

    def _table(self, name: str) -> np.ndarray:
        return to_float32(read(self.tensors[name]))

    @cached_property
    def _outer(self) -> np.ndarray:
        return np.repeat(self._table("weight.nested_absmax"), self.state["nested_blocksize"])

    def _scales(self, first: int, last: int) -> np.ndarray:
        stored = read(self.tensors["weight.absmax"], ((first, last),))
        if "weight.nested_absmax" not in self.tensors:
            return to_float32(stored)
        inner = self._table("weight.nested_quant_map")[stored]
        scales: np.ndarray = inner * self._outer[first:last] + np.float32(self.state["nested_offset"])
        return scales


def _is_short(state: LazyTensor) -> bool:
    """Whether a state is as long as one may be: it has a few hundred bytes."""
    return len(state.shape) == 1 and state.shape[0] <= STATE_BYTES


class EightBitNumbers(Numbers):
    """LLM.int8: code * the largest magnitude of its row / 127."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.weight, self.largest = tensors["weight"], tensors["SCB"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        values = to_float32(StoredNumbers(self.weight).rows(start, stop))
        values *= to_float32(read(self.largest, ((start, stop),)))[:, None]
        values /= 127
        return values
