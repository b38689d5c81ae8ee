"""Which tokens a model's tokens see: only those before them, as in every class of TensorRT-LLM, or those behind them too.

Fact: docs/format/runtime-1.2.md, section g3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.model.config_values import lookup
from pipeline.model.runtime import runtime

_REMEDY = "It is a model of embeddings, not of text: run it where such attention is computed, such as in transformers"


def check_causal(config: Mapping[str, Any], file: str) -> list[Problem]:
    """A problem for each key of a source's configuration that says that tokens see those behind them; a null says nothing."""
    expected = f"{{}}: TensorRT-LLM {runtime().release} lets tokens see those before them alone"
    return [
        Problem(f"{file}: {key}", repr(value), expected.format(causal), _REMEDY)
        for key, causal in runtime().causal.items()
        if (value := lookup(config, key)) is not None and value is not causal
    ]
