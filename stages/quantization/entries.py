"""Entry: an array on its way to the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.model.tables import Module, Slot
from pipeline.tensor.arrays import shared
from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import Parameter, plain

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray


@dataclass(frozen=True, slots=True)
class Entry:
    """An array on its way to the ranks: the slot that it belongs to and the parameter that it is there."""

    array: BlockArray
    slot: Slot
    parameter: Parameter


def entries_of(name: str, slot: Slot, packed: Mapping[str, tuple[BlockArray, Parameter]]) -> dict[TensorName, Entry]:
    """A module's own parameters, by name."""
    return {TensorName(name, key): Entry(array, slot, shared(parameter)) for key, (array, parameter) in packed.items()}


def whole_entry(name: TensorName, layer: int, array: BlockArray) -> tuple[TensorName, Entry]:
    """A small array that every rank of the layer's stage holds whole, under a module that the layout does not list."""
    owner = name.module.replace(f"layers.{layer}.", "layers.{layer}.")
    size = Parameter(axes=(("one", plain("tensor_scale").axes[0][1] * array.size),))
    return name, Entry(array, Slot(Module(owner, "replicate"), None, layer, None), size)
