"""Sort kinds of modules in the order in which a model uses them, as the layouts of `configs/` list them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.model.tables import families, layout
from pipeline.reporting.html.summary import TensorError

_LAYER, _MODEL = "transformer.layers.{layer}.", "transformer."


def in_order(tensors: Sequence[TensorError]) -> list[TensorError]:
    """Sort tensors by kind, in the order of the first layout that has every kind; unsorted where no layout has them all."""
    kinds = {_module(tensor.kind) for tensor in tensors}
    for name in dict.fromkeys(family.layout for family in families()):
        modules = [module.removeprefix(_LAYER).removeprefix(_MODEL) for module in layout(name).modules]
        if kinds <= set(modules):
            return sorted(tensors, key=lambda tensor: modules.index(_module(tensor.kind)))
    return list(tensors)


def _module(kind: str) -> str:
    """The module of `attention.qkv bias`."""
    return kind.partition(" ")[0]
