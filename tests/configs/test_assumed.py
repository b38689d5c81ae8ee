"""What a family assumes of keys that a configuration lacks is what transformers takes for them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from pipeline.model.config_values import assumed_notes, lookup
from pipeline.model.tables import Family, families

# Of families whose class transformers has: the others' is remote code.
CLASSES = {
    "ernie4_5": "Ernie4_5Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "granite": "GraniteConfig",
    "granitemoe": "GraniteMoeConfig",
    "helium": "HeliumConfig",
    "llama": "LlamaConfig",
    "llama_classifier": "LlamaConfig",
    "llama_first": "LlamaConfig",
    "mistral": "MistralConfig",
    "mixtral": "MixtralConfig",
    "phi3": "Phi3Config",
    "phimoe": "PhimoeConfig",
    "qwen2": "Qwen2Config",
    "qwen2_classifier": "Qwen2Config",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen2_vl": "Qwen2VLTextConfig",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "seed_oss": "SeedOssConfig",
}
# Those of the others' published configuration classes: norm_epsilon, max_position_embeddings; all have silu.
REMOTE = {
    "arctic": (1e-5, 4096),
    "baichuan": (1e-6, 4096),
    "baichuan1": (1e-6, 4096),
    "decilm": (1e-6, 2048),
    "internlm": (1e-6, 2048),
    "internlm3": (1e-6, 32768),
    "mimo": (1e-6, 32768),
    "minicpm": (1e-6, 2048),
    "skywork": (1e-6, 2048),
    "xverse": (1e-6, 2048),
    "yi": (1e-5, 4096),
}


def test_every_family_that_assumes_something_is_looked_at() -> None:
    assert {family.name for family in families() if family.assumed} == CLASSES.keys() | REMOTE.keys()


@pytest.mark.parametrize("name", REMOTE)
def test_the_values_are_those_of_the_published_classes(name: str) -> None:
    (family,) = (each for each in families() if each.name == name)
    epsilon, positions = REMOTE[name]
    assert family.assumed == {"hidden_act": "silu", "norm_epsilon": epsilon, "max_position_embeddings": positions}
    (note, *_) = assumed_notes({}, family, "a/config.json")
    assert note.endswith("and the default of its own code is this")


@pytest.mark.parametrize("family", [family for family in families() if family.name in CLASSES], ids=lambda family: family.name)
def test_the_values_are_those_of_transformers(family: Family) -> None:
    made: dict[str, Any] = getattr(transformers, CLASSES[family.name])().to_dict()
    looked_at = {field: value for field, value in family.assumed.items() if field not in family.defaults}
    assert looked_at
    for field, value in looked_at.items():
        assert next(found for key in family.keys(field) if (found := lookup(made, key)) is not None) == value, field
