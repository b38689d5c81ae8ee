"""A model's configuration: both styles of config.json, defaults, and one report of all that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.errors import BadInput
from pipeline.model_config import ModelConfig, lookup, model_config
from pipeline.tables import find_family
from tests.checkpoints import LLAMA, MIXTRAL

FILE = "config.json"
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(config: Mapping[str, Any]) -> ModelConfig:
    architecture = config["architectures"][0]
    family = find_family("huggingface", architecture)
    assert family is not None
    return model_config(config, family, architecture, FILE)


def refused(config: Mapping[str, Any]) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read(config)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_every_size_is_read() -> None:
    model = read({**LLAMA, "head_dim": 16})
    assert (model.vocab_size, model.hidden_size, model.num_hidden_layers) == (96, 64, 3)
    assert (model.num_attention_heads, model.num_key_value_heads, model.intermediate_size) == (8, 4, 160)
    assert (model.max_position_embeddings, model.norm_epsilon, model.hidden_act) == (128, 1e-5, "silu")
    assert (model.head_size, model.q_size, model.kv_size, model.rotary_embedding_dim) == (16, 128, 64, 16)
    assert model.tie_word_embeddings is False
    assert model.num_experts == 0


def test_the_style_of_transformers_5_means_the_same() -> None:
    old = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3}
    new = {**without(LLAMA, "rope_theta", "torch_dtype"), "dtype": "float16", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    assert read(old) == read(new)
    assert read(new).rotary_base == 500000.0
    assert read(new).rotary_scaling == LLAMA3


def test_default_rope_parameters_are_no_scaling() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1234.0}
    model = read({**without(LLAMA, "rope_theta"), "rope_parameters": parameters})
    assert (model.rotary_base, model.rotary_scaling) == (1234.0, None)


def test_defaults() -> None:
    model = read(without(LLAMA, "rope_theta", "num_key_value_heads", "tie_word_embeddings"))
    assert model.rotary_base == 10000.0
    assert model.num_key_value_heads == LLAMA["num_attention_heads"]
    assert model.head_size == 8
    assert (model.attn_bias, model.mlp_bias, model.tie_word_embeddings) == (False, False, None)
    assert read(without(MIXTRAL, "rope_theta")).rotary_base == 1000000.0


def test_null_counts_as_absent() -> None:
    assert read({**LLAMA, "head_dim": None, "num_key_value_heads": None, "rope_scaling": None}) == read(
        without(LLAMA, "num_key_value_heads")
    )


@pytest.mark.parametrize("key", ["bias", "attention_bias"])
def test_attention_bias_has_two_names(key: str) -> None:
    assert read({**LLAMA, key: True}).attn_bias
    assert not read({**LLAMA, key: False}).attn_bias


def test_experts() -> None:
    model = read(MIXTRAL)
    assert (model.num_experts, model.experts_per_token) == (4, 2)


def test_all_that_is_missing_is_reported_together() -> None:
    missing = ["vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps"]
    problems = refused(without(LLAMA, *missing))
    assert len(problems) == len(missing)
    for key in missing:
        assert any(problem.startswith(f"{FILE}: {key}:") for problem in problems), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "96"),
        ("vocab_size", 96.5),
        ("vocab_size", True),
        ("vocab_size", [96]),
        ("vocab_size", float("inf")),
        ("vocab_size", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("hidden_act", 3),
        ("tie_word_embeddings", "false"),
        ("attention_bias", 1),
        ("rope_theta", {"a": 1}),
        ("rope_scaling", 8),
        ("rope_scaling", "linear"),
        ("rope_scaling", [8]),
        ("rope_scaling", []),
        ("rope_parameters", "linear"),
        ("rope_parameters", 8),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", -4),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(key: str, value: Any) -> None:
    problems = refused({**LLAMA, key: value})
    assert len(problems) == 1
    assert key in problems[0]


def test_wrong_and_missing_are_one_report() -> None:
    problems = refused({**without(LLAMA, "vocab_size"), "hidden_size": "64", "rope_scaling": 3})
    assert len(problems) == 3


def test_a_hidden_size_that_heads_do_not_divide_needs_head_dim() -> None:
    assert "num_attention_heads" in refused({**LLAMA, "hidden_size": 65})[0]
    assert read({**LLAMA, "hidden_size": 65, "head_dim": 8}).head_size == 8


def test_a_whole_float_is_a_whole_number() -> None:
    assert read({**LLAMA, "vocab_size": 96.0}).vocab_size == 96


def test_lookup_prefers_the_flat_key() -> None:
    assert lookup({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert lookup({"a": {"b": 2}}, "a.b") == 2
    assert lookup({"a": 3}, "a.b") is None
