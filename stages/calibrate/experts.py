"""The experts of a layer, which transformers holds as stacked parameters: each is given out by itself, and what it takes is seen.

transformers' own forward pass asks a stack for one expert after the other. In its place stands an `ExpertStack`, which has them all
in memory, or reads each as it is asked for, so that a layer takes two matrices of one expert in the place of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.verify.forward.transformers_model import ParameterPart

TAKES = "_headrace_modules"  # of an expert's matrix: the modules whose rows it has


@dataclass(frozen=True)
class ExpertPart:
    """The rows of one expert's matrix that are of one module of the source."""

    weight: str
    rows: slice

    @property
    def module(self) -> str:
        return self.weight.removesuffix(".weight")


def expert_parts(parts: Sequence[ParameterPart]) -> tuple[tuple[ExpertPart, ...], ...]:
    """The parts of each expert of a stack [experts, out, in], or nothing where a parameter is no stack of experts' own weights."""
    found: dict[int, list[ExpertPart]] = {}
    for part in parts:
        if len(part.place) != 2 or not isinstance(part.place[0], int) or not isinstance(part.place[1], slice):
            return ()
        found.setdefault(part.place[0], []).append(ExpertPart(part.name, part.place[1]))
    return tuple(tuple(found[expert]) for expert in sorted(found))


class ExpertStack:
    """A stack of experts' matrices: `stack[number]` is one of them, [out, in]. `read(weight, into)` fills rows of it.

    `held`: whether all are read at once and stay in memory.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[ExpertPart]],
        empty: nn.Parameter,
        device: torch.device,
        read: Callable[[str, Tensor], None],
        held: bool,
    ) -> None:
        self._parts, self._read, self._device = parts, read, device
        self.shape, self.dtype = empty.shape, empty.dtype
        self._held = [self._matrix(number) for number in range(len(parts))] if held else None

    def __getitem__(self, number: Any) -> Tensor:
        matrix = self._held[int(number)] if self._held else self._matrix(int(number))
        setattr(matrix, TAKES, self._parts[int(number)])
        return matrix

    def modules(self) -> list[list[str]]:
        """The names of all modules, those together that are of one place in each expert."""
        return [[part.module for part in places] for places in zip(*self._parts, strict=True)]

    def _matrix(self, number: int) -> Tensor:
        matrix = torch.empty(self.shape[1:], dtype=self.dtype, device=self._device)
        for part in self._parts[number]:
            self._read(part.weight, matrix[part.rows])
        return matrix


class Watching(TorchFunctionMode):
    """While it is entered: tells `see(name, values)` what each expert's matrix is multiplied by."""

    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is nn.functional.linear and len(arguments) > 1:
            for part in getattr(arguments[1], TAKES, ()):
                self._see(f"{part.module}|x", arguments[0])
        return function(*arguments, **(keywords or {}))
