"""TensorName: the key of a tensor on its way through the stages, its module and its parameter."""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class TensorName(NamedTuple):
    """A tensor by its module (`model.layers.0.mlp.up_proj`) and the parameter that it is there (`weight`).

    Files and people know it as one text, `str(name)`; `split_name` takes such a text apart where tensors come in.
    """

    module: str
    parameter: str

    def __str__(self) -> str:
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def split_name(text: str) -> TensorName:
    """The name that a file gives a tensor, taken apart: its parameter stands behind the last dot."""
    module, _, parameter = text.rpartition(".")
    parameter = intern(parameter)  # of which there are few
    return TensorName(module, parameter) if module else TensorName("", text)


def split_names(tensors: Mapping[str, T]) -> dict[TensorName, T]:
    """Tensors under their names taken apart, in the same order.

    A tensor is no module: where the name of one begins with that of another and a dot (bitsandbytes' `q_proj.weight.absmax` beside
    `q_proj.weight`), both are of one module, and the longer parameter has dots.
    """
    return {_beside(text, tensors): tensor for text, tensor in tensors.items()}


def _beside(text: str, tensors: Mapping[str, T]) -> TensorName:
    """The name of one of `tensors`, taken apart."""
    beginning = text
    while beginning := beginning.rpartition(".")[0]:
        if beginning in tensors:
            module = split_name(beginning).module
            return TensorName(module, text[len(module) + 1 if module else 0 :])
    return split_name(text)


def by_module(tensors: Mapping[TensorName, T]) -> dict[str, dict[str, T]]:
    """Tensors by module, then by parameter."""
    modules: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        modules.setdefault(name.module, {})[name.parameter] = tensor
    return modules
