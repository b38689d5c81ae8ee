"""Say what config.json holds of a model's rope scaling: as TensorRT-LLM reads it, as the source has it, or nothing.

Facts: docs/format/runtime-1.2.md, sections b to b4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.model.model_config import ModelConfig
from pipeline.model.rotary import MROPE

RopeScaling = Literal["auto", "none", "keep"]


def written_scaling(model: ModelConfig, mode: RopeScaling) -> tuple[Mapping[str, Any] | None, str]:
    """Return the scaling that is written of a model's own, and a note of what was changed; "" for nothing.

    `mode`: "keep" leaves it as the source has it; "none" leaves it out; "auto" writes what TensorRT-LLM reads: null for no
    scaling at all, and yarn's original length, which the source may leave to be the model's own (docs/format/runtime-1.2.md,
    sections b to b4).
    """
    scaling, kind = model.rotary_scaling, model.rotary_type
    if scaling is None or mode == "keep" or (kind == MROPE and "mrope_section" in model.settings):
        return scaling, ""
    if kind == "default":
        return None, ""
    if mode == "none":
        exact = exact_length(model)
        until = (
            f"that is exact up to {exact} tokens"
            if exact
            else "the model is computed with it, so that an engine is exact at no length"
        )
        return None, f"--rope_scaling none: rope scaling {kind!r} is left out; {until}"
    if kind == "yarn" and scaling.get("original_max_position_embeddings") is None:
        positions = model.settings.get("original_positions") or model.max_position_embeddings
        note = f"yarn's original_max_position_embeddings is written as {positions}, the model's own: TensorRT-LLM would take 4096"
        return {**scaling, "original_max_position_embeddings": positions}, note
    return scaling, ""


def exact_length(model: ModelConfig) -> int:
    """Return the length in tokens up to which a model computes the same of text without its rope scaling; 0 where it never does."""
    return model.max_position_embeddings if model.rotary_type in ("dynamic", "default", MROPE) else 0
