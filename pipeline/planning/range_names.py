"""Transformers' names of the linears of a source that has others: ranges are measured under those."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.model.family_rows import RenameRow
from pipeline.model.tables import Slot
from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import X_RANGE, Y_RANGE
from stages.rename import Renamed

LAYER = "model.layers.{layer}."
# By the name that a linear has in a target's layer: its own name, and that of a module which has the rows of several.
MODULES: Mapping[str, tuple[str, ...]] = {
    "attention.qkv.q": ("self_attn.q_proj", "self_attn.qkv_proj"),
    "attention.qkv.k": ("self_attn.k_proj", "self_attn.qkv_proj"),
    "attention.qkv.v": ("self_attn.v_proj", "self_attn.qkv_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "mlp.gate": ("mlp.up_proj", "mlp.gate_up_proj"),
    "mlp.fc.gate": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "mlp.fc.up": ("mlp.up_proj", "mlp.gate_up_proj"),
    "mlp.proj": ("mlp.down_proj",),
}


def of_inputs(name: str, slot: Slot, renamed: Renamed, known: Collection[str]) -> Renamed:
    """Where the range of what a linear takes comes from. `name`: of the linear in the target; `known`: modules that have ranges."""
    module, _ = _module(name, slot, renamed, known)
    return Renamed(TensorName(module, X_RANGE), RenameRow(renamed.row.to))


def of_outputs(name: str, slot: Slot, renamed: Renamed, known: Collection[str]) -> Renamed:
    """Where the range of what a linear gives comes from: taken apart and put in order as the rows of its weight are."""
    module, fused = _module(name, slot, renamed, known)
    source, row = TensorName(module, Y_RANGE), RenameRow(renamed.row.to)
    if fused is None:
        return Renamed(source, renamed.row, renamed.rows, 0, renamed.total)
    return Renamed(source, row, renamed.rows, 0, renamed.total) if fused else Renamed(source, row)


def _module(name: str, slot: Slot, renamed: Renamed, known: Collection[str]) -> tuple[str, bool | None]:
    """The module that has a linear's ranges, and whether it has the rows of several; None where its rows are the source's own."""
    own = renamed.source.module
    if own in known or slot.layer is None:
        return own, None
    choices = MODULES.get(name.partition(f".layers.{slot.layer}.")[2], ())
    for place, choice in enumerate(choices):
        module = LAYER.format(layer=slot.layer) + choice
        if module in known and (place == 0 or renamed.rows):
            return module, place > 0
    return own, None
