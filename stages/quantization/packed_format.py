"""The one interface of a packed format: how its modules are known, checked and unpacked, and what TensorRT-LLM makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import Problem
from pipeline.tensor.tensors import LazyTensor

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

Modules = Mapping[str, Mapping[str, LazyTensor]]  # tensors by module and local name
OF_ALL = ("one",)  # the axes of a value that stands for all of a module


@dataclass(frozen=True)
class PackedParameter:
    """How a packed parameter lies along its module's axes, and what becomes of it.

    `axes`: by name (see AXES in pipeline/tensor/tensors.py), in the order of the array's; without `out`, it is of all rows.
    `rows`: the out-features that a number of the axis `out` holds, where that is the same for all modules of the format. `joint`:
    it is of all parts of a fused module at once, which nothing can take apart: such a module is refused.
    `becomes`: the canonical parameter that it is, where a target may have no place for that. `dropped`: why unpacking leaves it
    out.
    """

    axes: tuple[str, ...]
    rows: int = 1
    joint: bool = False
    becomes: str = ""
    dropped: str = ""


class PackedFormat(Protocol):
    """A packed format of sources. Each file of `stages/quantization/sources` has one, as `FORMAT`.

    `name`: what messages and tables call it. `title`: what its users call it. `numbers`: whether unpacking gives weights that are
    numbers, so that there are no codes to keep. `keeps`: TensorRT-LLM's algorithms that take its codes as they are. `proof`: what
    our reading was compared with, and how exactly. `parameters`: by local name, those that are not as a dense module's, whose
    parameters have `out` first.
    """

    name: str
    title: str
    numbers: bool = False
    keeps: tuple[str, ...] = ()
    proof: str = ""
    parameters: Mapping[str, PackedParameter]

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's parameters (by local name; anything with a shape and a dtype) are the format's."""
        ...

    def arrange(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """An accepted module's tensors in shapes that have the axes of `parameters`, where the source stores them as flat runs.

        May read small tensors. Tensors that contradict one another stay as they are, for `check` to name.
        """
        return tensors

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """The reasons why an accepted module cannot be unpacked, none where it can.

        `settings`: the source's quantization settings. May read small tensors.
        """
        ...

    def module_settings(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """The settings of one module, by its name in the source: `check` and `unpack` are given these. The source's own where
        they say nothing else of it. May read small tensors.
        """
        return settings

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """The canonical parameters (AXES) of a module that `check` found nothing wrong with. Reads nothing."""
        ...

    def heights(self, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, int]:  # noqa: ARG002
        """The rows that a number of a parameter stands for, by local name, of those whose last number may stand for fewer: the
        axis's length, which is rounded up, does not say it. Of a module that `check` found nothing wrong with.
        """
        return {}

    def act_order(self, tensors: Mapping[str, LazyTensor]) -> bool:  # noqa: ARG002
        """Whether a module's groups are not consecutive in-features: then it can only be dequantized. May read small tensors."""
        return False

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """TensorRT-LLM's algorithm that takes the codes of the source's modules (those of this format, by name) as they are, and
        their group size (0 without groups). None where there is none: then they can only be dequantized.
        """
        return None, 0

    def zero_points(self, settings: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Whether a target that keeps codes by groups has a `zero` tensor beside each: not where the source says it has none."""
        return True

    def notes(self, settings: Mapping[str, Any], algorithm: str) -> list[str]:  # noqa: ARG002
        """Notes for the plan: what a target that keeps the codes, as `algorithm`, does otherwise than the source's own kernels."""
        return []


def one_group_a_row(modules: Modules, scales: str, axis: int) -> bool:
    """Whether each row of every module has a single scale. `scales`: their local name; `axis`: that of the groups."""
    return all(tensors[scales].shape[axis] == 1 for tensors in modules.values())


def wide_activations(quantized: str, algorithm: str) -> str:
    """The note that a target's kernels take activations in 16 bits, where the source's took `quantized` ones."""
    return (
        f"the source's kernels quantize activations to {quantized}: those of {algorithm} take them in 16 bits, of the same weights"
    )
