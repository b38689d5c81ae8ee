"""Which modules a target quantizes."""

from __future__ import annotations

from pipeline.model.quantization import Quantization
from pipeline.model.tables import Module, Slot


def linear(module: Module) -> bool:
    """Whether quantization is for a module: one of a layer's split matrices; not a router, a norm or an embedding."""
    return module.in_layer and bool(module.in_) and module.split in ("column", "row")


def is_quantized(slot: Slot, quantization: Quantization, layers: int) -> bool:
    """Whether a target quantizes a slot's module.

    Not where that is left to the loader or a list excludes it, and Meta's recipe leaves attention and the first and last layers as
    they are.
    """
    if quantization.algorithm is None or quantization.left_to_loader or not linear(slot.module):
        return False
    if quantization.excludes(slot.module.name.replace("{layer}", str(slot.layer))):
        return False
    return not quantization.meta_recipe or (".attention." not in slot.module.name and slot.layer not in (0, layers - 1))
