"""Factors that the parts of a stack of experts have side by side, as one array in the order of the ranks.

A rank's tensor [experts, groups, out] has a run of some hundred bytes of each part in each group: of a large mixture these are
millions of places to write to. Of the joined array, the factors of an expert on a rank are one run. Fact:
docs/format/quantized-layouts.md, section 8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pipeline.model.tables import Module, Slot
from pipeline.tensor.derived import derive
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block
from stages.quantization.entries import Entry

if TYPE_CHECKING:
    from stages.shard import Sharding


def joined(entries: Mapping[TensorName, Entry], sharding: Sharding) -> dict[TensorName, Entry]:
    """The entries, with one in the place of those of a stack's parts whose axis `out` is not their first.

    It has the name of the first part's. Parts that are not alike stay apart: they are refused by name, or split unevenly.
    """
    stacks: dict[tuple[str, int | None, int | None, str], list[TensorName]] = defaultdict(list)
    for name, entry in entries.items():
        slot = entry.slot
        if slot.part and slot.module.experts and slot.module.split == "column" and entry.parameter.axes[0][0] == "group":
            stacks[slot.module.name, slot.layer, slot.expert, name.parameter].append(name)
    result = dict(entries)
    segments = sharding.parallelism.moe_tp_size
    for names in stacks.values():
        parts = [entries[name] for name in names]
        first = parts[0]
        order = [part.name for part in first.slot.module.parts]
        parts.sort(key=lambda entry: order.index(entry.slot.part.name) if entry.slot.part else 0)
        kinds = {(entry.array.shape, entry.array.dtype, entry.parameter) for entry in parts}
        *front, out = first.array.shape
        if len(parts) != len(order) or len(kinds) > 1 or out % segments:
            continue
        shape = (*front, out * len(parts))
        inputs = {f"part{number}": entry.array for number, entry in enumerate(parts)}
        rows = first.array.chunks[0] if len(front) > 1 else None
        array = derive("quantize", side_by_side, inputs, shape=shape, dtype=first.array.dtype, rows=rows, segments=segments)
        slot = Slot(_whole(first.slot.module, shape[-1]), None, first.slot.layer, first.slot.expert)
        for name in names:
            del result[name]
        result[names[0]] = Entry(array, slot, first.parameter)
    return result


@lru_cache(maxsize=64)
def _whole(module: Module, out: int) -> Module:
    """A fused module as one that has no parts."""
    return replace(module, parts=(), out=str(out))


def side_by_side(region: Region, segments: int, **parts: Block) -> np.ndarray:
    """A region of [..., groups, segments * parts * out / segments], of the values [..., groups, out] of each of the parts."""
    whole = [part.read((*region[:-1], (0, part.shape[-1]))) for part in parts.values()]
    *front, out = whole[0].shape
    stacked = np.stack([values.reshape(*front, segments, out // segments) for values in whole], axis=-2)
    start, stop = region[-1]
    result: np.ndarray = stacked.reshape(*front, len(whole) * out)[..., start:stop]
    return result
