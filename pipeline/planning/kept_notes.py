"""Notes for a plan that keeps a quantized source's codes or is given ranges: what the target does otherwise than these say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.model.quantization import FP8_ROWWISE, Quantization
from pipeline.planning.opening import OpenedSource
from pipeline.tensor.names import by_module
from pipeline.tensor.tensors import CODES, TensorMap
from stages.quantization.modules import is_quantized
from stages.quantization.sources import format_named

if TYPE_CHECKING:
    from stages.shard import Sharding


def source_notes(opened: OpenedSource, chosen: Sequence[Quantization], tensors: TensorMap) -> tuple[str, ...]:
    """The notes of all targets, each once. `chosen`: their quantizations, in order; `tensors`: the canonical ones."""
    found: dict[str, None] = dict.fromkeys(_unmeasured_cache(opened, chosen, tensors))
    for quantization, sharding in zip(chosen, opened.shardings, strict=True):
        if quantization.algorithm and not quantization.from_numbers:
            of_formats = (format_named(name) for name in dict.fromkeys(opened.packing.formats.values()))
            found |= dict.fromkeys(
                note for each in of_formats for note in each.notes(opened.packing.settings, quantization.algorithm)
            )
            found |= dict.fromkeys(_quantized_anew(quantization, sharding, tensors))
    return tuple(found)


def _unmeasured_cache(opened: OpenedSource, chosen: Sequence[Quantization], tensors: TensorMap) -> Iterator[str]:
    """That ranges are not used for the scale of an FP8 cache, as they are not of what is cached."""
    given = opened.job.act_range is not None or opened.job.calibrates
    if not (given and opened.model.qk_norm and any(each.fp8_kv_cache for each in chosen)):
        return
    if all(name.parameter != "kv_scale" for name in tensors):
        yield "the FP8 cache has scales of 1: keys are normed behind k_proj, whose outputs are what is measured"


def _quantized_anew(quantization: Quantization, sharding: Sharding, tensors: TensorMap) -> Iterator[str]:
    """That modules which the source left as numbers are quantized by row, and the option that would keep them."""
    if quantization.algorithm != FP8_ROWWISE:
        return
    recipe, layers = replace(quantization, meta_recipe=True), sharding.model.num_hidden_layers
    names, kept = [], True
    for name, parameters in by_module(tensors).items():
        slot = sharding.layout.find(name)
        if slot and is_quantized(slot, quantization, layers) and parameters.keys().isdisjoint(CODES):
            names.append(name)
            kept = kept and not is_quantized(slot, recipe, layers)
    if not names:
        return
    attention = sum(".attention." in name for name in names)
    which = f"{len(names)} matrices ({attention} of attention, {len(names) - attention} of the MLP), the first {names[0]}"
    keeps = "--use_meta_fp8_rowwise_recipe keeps them in 16 bits"
    keeps = keeps if kept else "no option keeps them in 16 bits beside the others' codes: --dequantize makes numbers of all"
    yield f"left in 16 bits by the source (modules_to_not_convert), and quantized to {FP8_ROWWISE} here: {which}; {keeps}"
