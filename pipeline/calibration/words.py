"""A calibration in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.printed import many
from pipeline.tensor.units import human_bytes


def calibration_words(facts: Mapping[str, Any]) -> str:
    """A calibration's summary for people."""
    experts = ", experts one by one" if facts["experts_one_by_one"] else ""
    peak, layer, scratch = (human_bytes(facts[name]) for name in ("peak_bytes", "layer_bytes", "scratch_bytes"))
    samples = f"{many(facts['samples'], 'sample')} of "
    return (
        f"{many(facts['layers'], 'layer')} in {facts['dtype']} on {facts['device']}{experts}, {samples}"
        f"{many(facts['tokens'], 'token')}; memory at most {peak} (a layer {layer}), "
        f"scratch {scratch}; about {facts['layer_seconds']:.1f} s a layer, {facts['seconds']:.0f} s in all"
    )
