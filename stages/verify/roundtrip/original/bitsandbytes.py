"""bitsandbytes' weights as numbers. Facts: docs/format/quantized-layouts.md, section 9c."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.documents import parse_json
from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers
from stages.verify.values import read

STATE = "weight.quant_state.bitsandbytes__"


class FourBitNumbers(Numbers):
    """The value of a code times the scale of its run. A byte of `weight` holds two codes of the flat matrix, the first above.

    Raises BadInput where the state says no shape, or the tensors are of other lengths.
    """

    def __init__(self, module: str, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = tensors
        name = next(name for name in tensors if name.startswith(STATE))
        try:
            self.state: dict[str, Any] = parse_json(bytes(read(tensors[name]).tolist()))
            rows, columns = self.state["shape"]
            sound = tensors["weight"].shape[0] * 2 == rows * columns and not columns % self.state["blocksize"]
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise BadInput([Problem(f"{module}.{name}", "no shape that fits the weight", "a state of bitsandbytes")])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    def rows(self, start: int, stop: int) -> Tensor:
        columns, size = self.shape[1], self.state["blocksize"]
        data = read(self.tensors["weight"], ((start * columns // 2, -(-stop * columns // 2)), (0, 1))).reshape(-1)
        codes = torch.stack([data >> 4, data & 15], -1).reshape(-1)[start * columns % 2 :][: (stop - start) * columns]
        values = self._table("weight.quant_map")[codes.long()].reshape(-1, size)
        return (values * self._scales(start * columns // size, stop * columns // size).unsqueeze(1)).reshape(-1, columns)

    def _table(self, name: str) -> Tensor:
        return read(self.tensors[name]).float()

    @cached_property
    def _outer(self) -> Tensor:
        return self._table("weight.nested_absmax").repeat_interleave(self.state["nested_blocksize"])

    def _scales(self, first: int, last: int) -> Tensor:
        stored = read(self.tensors["weight.absmax"], ((first, last),))
        if "weight.nested_absmax" not in self.tensors:
            return stored.float()
        inner = self._table("weight.nested_quant_map")[stored.long()]
        return inner * self._outer[first:last] + torch.tensor(self.state["nested_offset"], dtype=torch.float32)


class EightBitNumbers(Numbers):
    """LLM.int8: code * the largest magnitude of its row / 127."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.weight, self.largest = tensors["weight"], tensors["SCB"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return StoredNumbers(self.weight).rows(start, stop).float() * read(self.largest, ((start, stop),)).unsqueeze(1) / 127
