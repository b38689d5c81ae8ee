"""What a family assumes of keys that a configuration lacks is what transformers takes for them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from pipeline.model.config_values import lookup
from pipeline.model.tables import Family, families

# Of families whose class transformers has: the others' is remote code.
CLASSES = {
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "granite": "GraniteConfig",
    "llama": "LlamaConfig",
    "llama_first": "LlamaConfig",
    "mistral": "MistralConfig",
    "mixtral": "MixtralConfig",
    "phi3": "Phi3Config",
    "phimoe": "PhimoeConfig",
    "qwen2": "Qwen2Config",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
}


def test_every_family_that_assumes_something_is_looked_at() -> None:
    assert {family.name for family in families() if family.assumed} == CLASSES.keys()


@pytest.mark.parametrize("family", [family for family in families() if family.assumed], ids=lambda family: family.name)
def test_the_values_are_those_of_transformers(family: Family) -> None:
    made: dict[str, Any] = getattr(transformers, CLASSES[family.name])().to_dict()
    looked_at = {field: value for field, value in family.assumed.items() if field not in family.defaults}
    assert looked_at
    for field, value in looked_at.items():
        assert next(found for key in family.fields[field] if (found := lookup(made, key)) is not None) == value, field
