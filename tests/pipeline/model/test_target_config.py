"""TensorRT-LLM's config.json: templates, what they may name, and which keys are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import pytest

from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import CONFIGS, Family, families, layout
from pipeline.model.target_config import target_config

MODEL = ModelConfig("M", 96, 64, 3, 8, 4, 160, 128, "silu", 1e-5, 1e4, head_size=8, settings={"one": 1, "none": None, "list": []})
# What planning.py gives beside the model's values.
TARGET = {
    "dtype",
    "mapping",
    "quantization",
    "quantization_set",
    "tensor_parallel",
    "use_parallel_embedding",
    "embedding_sharding_dim",
    "disable_weight_only_quant_plugin",
    "remove_duplicated_kv_heads",
    "logits_dtype",
    "runtime_defaults",
    "tie_word_embeddings",
}
KNOWN = {field.name for field in fields(ModelConfig)} | {
    name for name in dir(ModelConfig) if isinstance(getattr(ModelConfig, name), property)
}

each_family = pytest.mark.parametrize("family", families(), ids=lambda family: family.name)


def filled(template: Mapping[str, Any], over: Mapping[str, Any] | None = None, **target: Any) -> dict[str, Any]:
    return target_config(template, over or {}, MODEL, target)


def names(template: Mapping[str, Any]) -> Iterator[str]:
    """What a template's values name, tables within it included."""
    for value in template.values():
        if isinstance(value, Mapping):
            yield from names(value)
        elif isinstance(value, str) and value.startswith("$"):
            yield value[1:]


def test_a_name_is_a_value_of_the_target_or_of_the_model() -> None:
    template = {"a": "$dtype", "b": "$hidden_size", "c": "$q_size", "d": "$one", "e": "plain", "f": 2, "g": False}
    assert filled(template, dtype="float16") == {
        "a": "float16",
        "b": 64,
        "c": 64,
        "d": 1,
        "e": "plain",
        "f": 2,
        "g": False,
    }


def test_the_target_goes_before_the_model_and_a_setting_before_a_field() -> None:
    assert filled({"a": "$hidden_size"}, hidden_size=7) == {"a": 7}
    model = replace(MODEL, settings={"hidden_size": 5})
    assert target_config({"a": "$hidden_size"}, {}, model, {}) == {"a": 5}


def test_null_is_written_unless_the_name_ends_in_a_question_mark() -> None:
    assert filled({"a": "$null", "b": "$none", "c": "$rotary_scaling"}) == {"a": None, "b": None, "c": None}
    assert filled({"a": "$none?", "b": "$rotary_scaling?", "c": "$nobody?", "d": "$one?"}) == {"d": 1}


@pytest.mark.parametrize("value", [0, 0.0, False, "", [], {}])
def test_only_null_is_left_out(value: Any) -> None:
    """An empty list is what a model with no such layers has."""
    assert filled({"a": "$it?", "b": {"c": "$it?"}}, it=value) == {"a": value, "b": {"c": value}}


def test_omit_leaves_a_key_of_the_template_out() -> None:
    template = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}
    assert filled(template, {"a": "$omit", "b": {"c": "$omit"}}) == {"b": {"d": 3}, "e": 4}
    assert filled({"a": "$omit", "b": {"c": "$omit"}}) == {"b": {}}


def test_a_familys_rows_replace_values_and_come_last_where_they_are_new() -> None:
    template = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}
    over = {"z": "$one", "b": {"c": "$hidden_act", "y": 5}, "a": "$null"}
    result = filled(template, over)
    assert result == {"a": None, "b": {"c": "silu", "d": 3, "y": 5}, "e": 4, "z": 1}
    assert list(result) == ["a", "b", "e", "z"]
    assert list(result["b"]) == ["c", "d", "y"]


def test_a_familys_rows_go_into_the_tables_that_names_stand_for() -> None:
    over = {"quantization": {"a": "$null", "c": "$omit"}}
    assert filled({"quantization": "$quantization"}, over, quantization={"a": 1, "b": 2, "c": 3}) == {
        "quantization": {"a": None, "b": 2}
    }


def test_what_is_given_is_not_changed() -> None:
    quantization = {"a": 1, "b": {"c": 2}}
    template = {"quantization": "$quantization", "list": "$list"}
    over = {"quantization": {"b": {"c": 3}}}
    filled(template, over, quantization=quantization)
    assert quantization == {"a": 1, "b": {"c": 2}}
    assert template == {"quantization": "$quantization", "list": "$list"}
    assert over == {"quantization": {"b": {"c": 3}}}


@each_family
def test_a_template_names_what_exists(family: Family) -> None:
    """A name that nobody knows would be null, or silently left out."""
    known = TARGET | KNOWN | {"null", "omit"}
    # A setting that only some of a layout's families have is left out by the others.
    cousins = {
        name for other in families() if layout(other.layout).config == layout(family.layout).config for name in other.settings
    }
    for template in (layout(family.layout).config, family.config):
        for name in names(template):
            assert name in known | set(family.settings) or (
                name.endswith("?") and name[:-1].partition(".")[0] in known | cousins
            ), name


@each_family
def test_a_setting_is_not_a_value_of_the_target(family: Family) -> None:
    assert TARGET.isdisjoint(family.settings)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONFIGS / "layouts").glob("*.toml"))])
def test_every_layout_says_what_the_loader_asks_for(name: str) -> None:
    asked = {
        "architecture",
        "dtype",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    }
    asked |= {"hidden_act", "norm_epsilon", "position_embedding_type", "max_position_embeddings", "intermediate_size"}
    asked |= {"rotary_base", "mapping", "quantization"}
    assert asked <= set(layout(name).config)
