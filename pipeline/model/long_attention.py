"""Attention of long texts that TensorRT-LLM's classes do not compute: a plan says up to which length the model is exact.

Fact: docs/format/runtime-1.2.md, section g2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.model.runtime import runtime


def long_attention_notes(config: Mapping[str, Any], longest: int) -> tuple[str, ...]:
    """A note for each key of a source's configuration that asks for such attention. `longest`: the model's longest sequence."""
    asked = {key: config[key] for key in runtime().beyond_a_length if isinstance(config.get(key), Mapping)}
    return tuple(_note(key, said, longest) for key, said in asked.items() if said)


def _note(key: str, said: Mapping[str, Any], longest: int) -> str:
    known = runtime().beyond_a_length[key]
    length = said.get(known.length)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        reach = f"where it begins is not known, as {key} has no {known.length}"
    elif length >= longest:
        reach = f"the model's {longest} tokens need none of it"
    else:
        reach = f"exact up to {length} tokens ({known.length}), and not the model's beyond, up to its {longest}"
    return f"{known.title}: no class of TensorRT-LLM {runtime().release} computes it ({key}); {reach}"
