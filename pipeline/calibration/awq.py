"""The part of a calibration's plan that is AWQ's search: for which models it can be made, and the memory that it takes beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem
from pipeline.model.awq_settings import RATIOS, WORKING_BYTES, AwqSettings

if TYPE_CHECKING:
    from stages.calibrate.layers import LayeredModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def awq_problems(model: LayeredModel, config: Mapping[str, Any], settings: AwqSettings) -> Iterator[Problem]:
    """The reasons why a model cannot have scales of AWQ."""
    subject, size = f"--awq_group_size {settings.group_size}", settings.group_size
    experts = next((config[key] for key in EXPERTS if config.get(key)), 0)
    if experts:
        expected, remedy = "a model without experts: TensorRT-LLM's class has no W4A16_AWQ for them", "Leave it out"
        yield Problem(subject, f"{experts} experts a layer", expected, remedy)
    uneven = next(((name, width) for name, width in _widths(model) if width % size), None)
    if uneven:
        name, width = uneven
        fitting = 64 if size != 64 and not any(each % 64 for _, each in _widths(model)) else 0
        remedy = f"Give --awq_group_size {fitting}" if fitting else "Leave it out: no kernel has groups for it"
        yield Problem(subject, f"{name} of {width} in-features", f"a multiple of {size}", remedy)


def awq_bytes(model: LayeredModel, settings: AwqSettings, tokens: int, length: int) -> int:
    """The most bytes that a search takes: of `tokens` in all what is kept of each linear's input, one sample's, and its work."""
    kept, sample = 0, 0
    for number in range(len(model)):
        widths = [width for _, width in model.shapes(number).values()]
        kept = max(kept, sum(settings.held_bytes(width, tokens) for width in widths))
        sample = max(sample, 8 * length * sum(widths))
    return kept + sample + WORKING_BYTES


def awq_flops(model: LayeredModel, settings: AwqSettings, tokens: int) -> int:
    """The operations of a layer's search: outputs of a rounding's differences, for each ratio, and sums of products."""
    found = 0
    for number in range(len(model)):
        shapes = model.shapes(number).values()
        kept = [settings.held_bytes(width, tokens) // (4 * width) for _, width in shapes]
        found = max(found, sum(2 * rows * width * each * RATIOS for (rows, width), each in zip(shapes, kept, strict=True)))
    return found


def _widths(model: LayeredModel) -> Iterator[tuple[str, int]]:
    return ((name, width) for number in range(len(model)) for name, (_, width) in model.shapes(number).items())
