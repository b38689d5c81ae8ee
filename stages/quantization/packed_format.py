"""The one interface of a packed format: how its modules are known, checked and unpacked, and what TensorRT-LLM makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import Problem
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.tensors import LazyTensor

Modules = Mapping[str, Mapping[str, LazyTensor]]  # tensors by module and local name
OF_ALL = ("one",)  # the axes of a value that stands for all of a module


@dataclass(frozen=True)
class PackedParameter:
    """How a packed parameter lies along its module's axes, and what becomes of it.

    `axes`: by name (see AXES in pipeline/tensor/tensors.py), in the order of the array's; without `out`, it is of all rows.
    `rows`: the out-features that a number of the axis `out` holds, where that is the same for all modules of the format.
    `becomes`: the canonical parameter that it is, where a target may have no place for that. `dropped`: why unpacking leaves it
    out.
    """

    axes: tuple[str, ...]
    rows: int = 1
    becomes: str = ""
    dropped: str = ""


class PackedFormat(Protocol):
    """A packed format of sources. Each file of `stages/quantization/sources` has one, as `FORMAT`.

    `name`: what messages and tables call it. `title`: what its users call it. `numbers`: whether unpacking gives weights that are
    numbers, so that there are no codes to keep. `parameters`: by local name, those that are not as a dense module's, whose
    parameters have `out` first.
    """

    name: str
    title: str
    numbers: bool = False
    parameters: Mapping[str, PackedParameter]

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's parameters (by local name; anything with a shape and a dtype) are the format's."""
        ...

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """The reasons why an accepted module cannot be unpacked, none where it can.

        `settings`: the source's quantization settings. May read small tensors.
        """
        ...

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """The canonical parameters (AXES) of a module that `check` found nothing wrong with. Reads nothing."""
        ...

    def act_order(self, tensors: Mapping[str, LazyTensor]) -> bool:  # noqa: ARG002
        """Whether a module's groups are not consecutive in-features: then it can only be dequantized. May read small tensors."""
        return False

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """TensorRT-LLM's algorithm that takes the codes of the source's modules (those of this format, by name) as they are, and
        their group size (0 without groups). None where there is none: then they can only be dequantized.
        """
        return None, 0
