"""What a family takes for keys that a configuration lacks is what transformers' class takes, or there is a reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import pytest
import transformers

from pipeline.model.config_values import lookup
from pipeline.model.model_config import ModelConfig
from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS, Family, families
from tests.configs.test_assumed import CLASSES, REMOTE

# Of families whose class is remote code and that assume nothing.
ALSO_REMOTE = {"exaone", "internlm2", "qwen"}
PAIRS = [(family, CLASSES[family.name]) for family in families() if family.name in CLASSES]
PAIRS += [(family, "Qwen2_5_VLTextConfig") for family in families() if family.name == "qwen2_vl"]
each = pytest.mark.parametrize(("family", "name"), PAIRS, ids=[name for _, name in PAIRS])

# Defaults that differ from transformers', by family ("*": any) and name.
OURS = {
    (
        "gemma",
        "hidden_act",
    ): "NVIDIA's (docs/format/families.md, section 7), of which TensorRT-LLM computes transformers' own",
    ("gemma2", "hidden_act"): "as Gemma's: its class in transformers has hidden_activation alone",
    ("gemma3", "hidden_act"): "as Gemma's: its class in transformers has hidden_activation alone",
    ("*", "seq_length"): "NVIDIA's (docs/format/families.md, section 2): transformers' Qwen2 has no such key",
    ("llama_classifier", "max_window_layers"): "of Qwen2's class, and not used: LLaMA has no window",
    ("seed_oss", "max_window_layers"): "of Qwen2's class, and not used: Seed-OSS has no window",
    ("qwen3", "mlp_only_layers"): "of layers without a mixture, which Qwen3's class does not ask for",
    ("qwen3", "decoder_sparse_step"): "of layers without a mixture, which Qwen3's class does not ask for",
    ("qwen3_moe", "max_window_layers"): "of Qwen2's class, and not used: every layer of Qwen3-MoE has the window",
    ("qwen3_moe", "head_size"): "Qwen3's; transformers computes it of the sizes, and the shapes of q and k tell a wrong one",
}
# Sizes that the shapes of tensors are held against: a wrong one is refused. Without tie_word_embeddings, whether there is a lm_head
# decides; without layer_types, the other settings of windows do, by which transformers computes them.
TOLD = {
    "num_key_value_heads",
    "head_size",
    "num_experts",
    "experts_per_token",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_labels",
    "tie_word_embeddings",
    "layer_types",
}


def of_transformers(family: Family, name: str) -> dict[str, Any]:
    """The configuration of a class whose values are all its defaults; a window that is used on request is asked for."""
    asked = {"use_sliding_window": True} if family.settings.get("use_sliding_window") else {}
    made: dict[str, Any] = getattr(transformers, name)(**asked).to_dict()
    return {**made, "use_sliding_window": getattr(transformers, name)().to_dict().get("use_sliding_window")} if asked else made


def value_of(made: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((found for key in keys if (found := lookup(made, key)) is not None), None)


def test_every_family_of_hugging_face_is_looked_at() -> None:
    assert {
        family.name for family in families() if family.container == "huggingface"
    } == CLASSES.keys() | REMOTE.keys() | ALSO_REMOTE


@each
def test_a_default_is_that_of_transformers(family: Family, name: str) -> None:
    """A value without a key is no default, but what the class always has."""
    made = of_transformers(family, name)
    for field, value in family.defaults.items():
        keys = family.keys(field)
        if keys and (family.name, field) not in OURS and ("*", field) not in OURS:
            assert value_of(made, keys) == value, field


@each
def test_a_key_without_a_default_means_nothing_in_transformers_too(family: Family, name: str) -> None:
    made = of_transformers(family, name)
    without = {spec.name: None if spec.default is MISSING else spec.default for spec in fields(ModelConfig)}
    required = {spec.name for spec in fields(ModelConfig) if spec.default is MISSING}
    for field, keys in {**family.fields, **family.settings}.items():
        if field in {*family.defaults, *family.assumed, *required, *TOLD}:
            continue
        # Of the original length of a long rope the usual value is a setting of its own: what is written says which was taken.
        usual = family.defaults.get("usual_positions") if field == "original_positions" else None
        theirs, ours = value_of(made, keys), usual or without.get(field)
        assert theirs == ours or not (theirs or ours) or theirs in family.expect.get(field, ()), field


@pytest.mark.parametrize("family", load_table(CONFIGS / "formats", "wrappers")["texts"]["defaults"])
def test_what_an_entry_of_a_wrapper_lacks_is_that_of_transformers(family: str) -> None:
    values = load_table(CONFIGS / "formats", "wrappers")["texts"]["defaults"][family]
    made = getattr(transformers, CLASSES[family])().to_dict()
    assert {key: made[key] for key in values} == values


@pytest.mark.parametrize(("family", "field"), OURS)
def test_what_differs_is_said_of_what_is_there(family: str, field: str) -> None:
    pairs = [(each, name) for each, name in PAIRS if family in ("*", each.name) and each.keys(field)]
    assert any(value_of(of_transformers(each, name), each.keys(field)) != each.defaults[field] for each, name in pairs)
