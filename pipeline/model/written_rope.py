"""Say what config.json holds of a model's rope scaling: as TensorRT-LLM reads it, as the source has it, or nothing.

Facts: docs/format/runtime-1.2.md, sections b to b4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import Problem
from pipeline.model.long_rope import LENGTH, reads_long_rope, usual_length
from pipeline.model.model_config import ModelConfig
from pipeline.model.rotary import MROPE
from pipeline.model.runtime import runtime
from pipeline.model.tables import Family
from pipeline.printed import printed

RopeScaling = Literal["auto", "none", "keep"]


def written_scaling(model: ModelConfig, family: Family, mode: RopeScaling) -> tuple[Mapping[str, Any] | None, str]:
    """Return the scaling that is written of a model's own, and a note of what was changed; "" for nothing.

    `mode`: "keep" leaves it as the source has it; "none" leaves it out; "auto" writes what TensorRT-LLM reads: null for no
    scaling at all, and an original length, which the source may leave to be the model's own (docs/format/runtime-1.2.md,
    sections b to b4).
    """
    scaling, kind = model.rotary_scaling, model.rotary_type
    if scaling is None or (kind == MROPE and "mrope_section" in model.settings):
        return scaling, ""
    if mode != "none" and reads_long_rope(model) and LENGTH not in model.long_rope:
        positions = usual_length(model)
        note = f"{kind}'s {LENGTH} is written as {positions}, which transformers takes for one that is missing"
        return {**scaling, LENGTH: positions}, note
    positions, taken = _own_length(scaling, model, family)
    if mode == "keep" and positions:
        without = f"{kind} without {LENGTH}, for which TensorRT-LLM takes {taken} and the model {positions}"
        return scaling, f"--rope_scaling keep: {without}, is written as it is"
    if mode == "keep":
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
    if positions:
        note = f"{kind}'s {LENGTH} is written as {positions}, the model's own: TensorRT-LLM would take {taken}"
        return {**scaling, LENGTH: positions}, note
    return scaling, ""


def exact_length(model: ModelConfig) -> int:
    """Return the length in tokens up to which a model computes the same of text without its rope scaling; 0 where it never does."""
    return model.max_position_embeddings if model.rotary_type in ("dynamic", "default", MROPE) else 0


def undeclared(model: ModelConfig, family: Family, file: str) -> list[Problem]:
    """Return the problems of a scaling without keys for which transformers has no value and TensorRT-LLM that of another model."""
    row = runtime().rope.get(model.rotary_type)
    if row is None or _means_the_class(family):
        return []
    found, expected = f"{model.rotary_type} without it", "a value: transformers has none, and TensorRT-LLM that of Llama 3.1"
    missing = [key for key in row.declared if (model.rotary_scaling or {}).get(key) is None]
    remedy = "Add the key, as the model was trained with it"
    return [Problem(f"{file}: rope_scaling.{key}", found, expected, remedy) for key in missing]


def overlooked_notes(model: ModelConfig) -> list[str]:
    """Say which keys of a scaling change nothing, in engines as in transformers, though other programs read them."""
    row, scaling = runtime().rope.get(model.rotary_type), model.rotary_scaling or {}
    return [
        f"rope_scaling.{key} {printed(str(scaling[key]))} changes nothing in an engine, as in transformers: {others}"
        for key, others in (row.overlooked if row else {}).items()
        if scaling.get(key) not in (None, 1)
    ]


def _own_length(scaling: Mapping[str, Any], model: ModelConfig, family: Family) -> tuple[int, int]:
    """Return the original length that a scaling leaves to be the model's own, and that which TensorRT-LLM takes; 0 for none."""
    row = runtime().rope.get(model.rotary_type)
    if row is None or not row.length or scaling.get(LENGTH) is not None or _means_the_class(family):
        return 0, 0
    return int(model.settings.get("original_positions") or model.max_position_embeddings), row.length


def _means_the_class(family: Family) -> bool:
    """Whether keys that are missing mean the values of Llama 3.1, as in Meta's params.json."""
    return bool(family.scaling)
