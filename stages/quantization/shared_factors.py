"""Factors of activations that the parts of a fused module have in common: a module multiplies its input once, for all of its parts.

q, k and v of one attention take one input. A checkpoint may say their factors part by part; where these differ no file of the
target can hold them. Fact: docs/format/quantized-layouts.md, section 7.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block
from stages.quantization.entries import Entry

FACTORS = "prequant_scaling_factor"


def one_for_all(entries: Mapping[TensorName, Entry], origin: Callable[[TensorName], object]) -> dict[TensorName, Entry]:
    """The factors of the parts of fused modules, each read beside those of the other parts, of which it must not differ."""
    fused: dict[tuple[str, int | None, int | None], list[TensorName]] = defaultdict(list)
    for name, entry in entries.items():
        slot = entry.slot
        if name.parameter == FACTORS and slot.part:
            fused[slot.module.name, slot.layer, slot.expert].append(name)
    result = {}
    for names in fused.values():
        own = {f"part{number}": entries[name].array for number, name in enumerate(names)}
        said = tuple(str(origin(TensorName(name.module, "weight"))) for name in names)
        for name in names:
            entry = entries[name]
            array = derive("quantize", alike, own, shape=entry.array.shape, dtype=entry.array.dtype, by_place=True, names=said)
            result[name] = replace(entry, array=array)
    return result


def alike(region: Region, names: Sequence[str], **parts: Block) -> np.ndarray:
    """The factors of the region, which all parts must have. Raises BadInput naming the first two parts whose factors differ."""
    first, *others = (np.asarray(part.read(region)) for part in parts.values())
    for name, other in zip(names[1:], others, strict=True):
        if not np.array_equal(first, other):
            found = f"other factors of the activations than {names[0]} has"
            remedy = "Give --dequantize, or --requantize, which quantizes all of it again"
            raise BadInput([Problem(name, found, "the same for all parts of a fused module, which has one input", remedy)])
    return first
