"""A model's configuration: both styles of config.json, defaults, and one report of all that is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.errors import BadInput
from pipeline.model.config_values import lookup
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import families, find_family, layout
from tests.support.checkpoints import LLAMA, MIXTRAL

FILE = "config.json"
GEMMA_3 = {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 16, "hidden_act": "gelu"}
QWEN_3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
PHI_3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}


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
    missing = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"]
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


# Settings: what goes to the target as it is.


def test_a_setting_is_taken_as_it_is_written() -> None:
    settings = read({**GEMMA_3, "query_pre_attn_scalar": 24, "sliding_window": 64, "rope_local_base_freq": 5000}).settings
    assert settings["query_pre_attn_scalar"] == 24
    assert settings["sliding_window"] == 64
    assert settings["rope_local_base_freq"] == 5000


def test_a_setting_that_is_null_stays_null_and_one_that_is_absent_has_the_default() -> None:
    assert read(GEMMA_3).settings["sliding_window"] == 4096
    assert read({**GEMMA_3, "sliding_window": None}).settings["sliding_window"] is None
    # No default either.
    assert read(GEMMA_3).settings["final_logit_softcapping"] is None
    assert set(read(GEMMA_3).settings) == set(read({**GEMMA_3, "sliding_window": None}).settings)


def test_of_several_keys_the_first_that_is_not_null_counts() -> None:
    keys = {"sliding_window_pattern": None, "_sliding_window_pattern": 3}
    assert read({**GEMMA_3, **keys}).settings["sliding_window_pattern"] == 3
    assert read({**GEMMA_3, **keys, "sliding_window_pattern": 2}).settings["sliding_window_pattern"] == 2
    assert read({**GEMMA_3, "_sliding_window_pattern": None}).settings["sliding_window_pattern"] is None


def test_a_setting_may_be_inside_a_table() -> None:
    parameters = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 9.0}}
    model = read({**without(GEMMA_3, "rope_theta"), "rope_parameters": parameters})
    assert (model.rotary_base, model.settings["rope_local_base_freq"]) == (7.0, 9.0)


def test_a_value_is_a_setting_a_field_or_nothing() -> None:
    model = read({**GEMMA_3, "sliding_window": None})
    assert model.value("sliding_window") is None
    assert model.value("query_pre_attn_scalar") == 256
    assert (model.value("hidden_size"), model.value("q_size"), model.value("no_such_name")) == (64, 128, None)


@pytest.mark.parametrize("kind", ["qwen3_vl_text", "qwen2", None])
def test_the_architecture_tells_the_family_whatever_the_type_is(kind: str | None) -> None:
    """As of the text of a Qwen3-VL that was saved alone."""
    model = read({**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": kind})
    assert (model.settings["qwen_type"], model.qk_norm) == ("qwen3", True)


def test_llama_has_no_settings() -> None:
    assert read(LLAMA).settings == {}


# Expectations: what TensorRT-LLM's model class has no choice of.


@pytest.mark.parametrize("key", ["decoder_sparse_step", "mlp_only_layers"])
def test_what_the_target_cannot_express_is_refused(key: str) -> None:
    values = {"decoder_sparse_step": 2, "mlp_only_layers": [0]}
    assert read({**QWEN_3_MOE, "decoder_sparse_step": 1, "mlp_only_layers": []})
    assert read({**QWEN_3_MOE, key: None})
    (problem,) = refused({**QWEN_3_MOE, key: values[key]})
    assert problem.startswith(f"{FILE}: {key}: found {values[key]}")


def test_all_that_is_unexpected_is_reported_together() -> None:
    assert len(refused({**QWEN_3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [0]})) == 2


@pytest.mark.parametrize("model", [PHI_3, MIXTRAL, QWEN_3_MOE], ids=lambda model: model["model_type"])
def test_a_field_may_be_expected_too(model: dict[str, Any]) -> None:
    (problem,) = refused({**model, "hidden_act": "gelu"})
    assert problem.startswith(f"{FILE}: hidden_act: found 'gelu'; expected 'silu'")
    assert read(without(model, "hidden_act")).hidden_act == "silu"


def test_an_activation_that_is_written_whatever_the_source_has_is_expected() -> None:
    """config.json's `hidden_act` is one value for these: a source with another would be another model."""
    written = {family.name: {**layout(family.layout).config, **family.config}["hidden_act"] for family in families()}
    constant = [family for family in families() if family.fields.get("hidden_act") and not written[family.name].startswith("$")]
    assert len(constant) >= 7
    for family in constant:
        assert (written[family.name], family.expect.get("hidden_act")) == ("swiglu", ("silu",)), family.name


def test_a_setting_of_which_none_is_allowed_may_be_null() -> None:
    assert read({**GEMMA_3, "attn_logit_softcapping": None})
    (problem,) = refused({**GEMMA_3, "attn_logit_softcapping": 50.0})
    assert "expected null" in problem


@pytest.mark.parametrize("value", [None, "256", True, -1, 0, math.nan, 10**400])
@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("Gemma2ForCausalLM", "query_pre_attn_scalar"),
        ("Gemma3ForCausalLM", "query_pre_attn_scalar"),
        ("Gemma3ForCausalLM", "rope_local_base_freq"),
        ("MiniCPMForCausalLM", "scale_depth"),
        ("MiniCPMForCausalLM", "dim_model_base"),
    ],
)
def test_a_setting_that_is_a_number_in_every_model(architecture: str, key: str, value: Any) -> None:
    config = {**LLAMA, "architectures": [architecture], "hidden_act": "gelu" if "Gemma" in architecture else "silu"}
    assert read({**config, key: 24})
    (problem,) = refused({**config, key: value})
    assert problem.startswith(f"{FILE}: ")
    assert problem.partition(": found")[0].endswith(key)
    assert problem.endswith("expected a number greater than 0")


@pytest.mark.parametrize("value", [None, "0", -0.1])
def test_a_number_that_may_be_0(value: Any) -> None:
    config = {**MIXTRAL, "architectures": ["PhimoeForCausalLM"], "attention_bias": True, "lm_head_bias": True}
    assert read({**config, "router_jitter_noise": 0}).value("router_jitter_noise") == 0
    (problem,) = refused({**config, "router_jitter_noise": value})
    assert problem.endswith("expected a number of 0 or more")


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_expectations_are_met_by_the_defaults(family: Any) -> None:
    for name, allowed in family.expect.items():
        default = family.defaults.get(name)
        assert default is None or default in allowed


# What follows from other values.


def test_a_dimension_is_a_field_a_property_or_a_number() -> None:
    model = read(LLAMA)
    assert [model.dimension(name) for name in ("hidden_size", "kv_size", "1", "12")] == [64, 32, 1, 12]


def test_experts_have_the_size_of_the_mlp_unless_they_have_their_own() -> None:
    assert read(MIXTRAL).expert_intermediate_size == 160
    assert read(QWEN_3_MOE).expert_intermediate_size == 24


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_long_rope(kind: str) -> None:
    model = read({**PHI_3, "rope_scaling": {**LONG_ROPE, "type": kind}, "original_max_position_embeddings": 32})
    assert (model.rotary_type, model.position_embedding_type) == (kind, "long_rope")
    assert (model.value("long_rope.short_factor"), model.value("long_rope.long_factor")) == ([1.0, 1.1], [2.0, 3.0])
    assert (model.value("long_rope.short_mscale"), model.value("long_rope.long_mscale")) == (None, None)
    assert model.value("long_rope.original_max_position_embeddings") == 32


def test_long_rope_in_the_style_of_transformers_5() -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 5.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16}
    config = {**without(PHI_3, "rope_theta"), "rope_parameters": {**without(LONG_ROPE, "type"), **parameters}}
    model = read(config)
    positions = model.value("long_rope.original_max_position_embeddings")
    assert (model.position_embedding_type, positions, model.rotary_base) == ("long_rope", 16, 5.0)
    assert (model.rotary_pct, model.rotary_embedding_dim) == (0.5, 4)
    assert model.rotary_scaling == {**without(LONG_ROPE, "type"), "rope_type": "longrope", "original_max_position_embeddings": 16}


def test_without_long_rope_there_are_no_factors() -> None:
    model = read({**PHI_3, "original_max_position_embeddings": 128})
    assert (model.rotary_type, model.position_embedding_type) == ("default", "rope_gpt_neox")
    names = ("short_factor", "long_factor", "original_max_position_embeddings")
    assert [model.value(f"long_rope.{name}") for name in names] == [None, None, None]
    linear = read({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (linear.rotary_type, linear.position_embedding_type) == ("linear", "rope_gpt_neox")


def test_full_layers_are_those_whose_positions_are_scaled() -> None:
    """A model with two kinds of layers has parameters for each."""
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = read({**without(LLAMA, "rope_theta"), "rope_parameters": parameters})
    assert (model.rotary_scaling, model.rotary_base) == ({"rope_type": "linear", "factor": 8.0}, 1e6)
    parameters["full_attention"] = {"rope_type": "default", "rope_theta": 1e6}
    assert read({**without(LLAMA, "rope_theta"), "rope_parameters": parameters}).rotary_scaling is None


def test_granites_multipliers() -> None:
    given = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22, "logits_scaling": 8.0}
    model = read({**LLAMA, "architectures": ["GraniteForCausalLM"], **given})
    assert (model.embedding_multiplier, model.residual_multiplier) == (12.0, 0.22)
    # TensorRT-LLM divides the scores by sqrt(head_size) in any case.
    assert math.isclose(model.scaled_attention_multiplier / math.sqrt(model.head_size), 0.0625)
    assert model.output_multiplier_scale == 0.125


@pytest.mark.parametrize("key", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "2"])
def test_a_multiplier_is_a_number_greater_than_0(key: str, value: Any) -> None:
    (problem,) = refused({**LLAMA, "architectures": ["GraniteForCausalLM"], key: value})
    assert key in problem


def test_experts_must_be_there_to_be_chosen() -> None:
    assert "num_experts" in refused(without(QWEN_3_MOE, "num_experts"))[0]
    assert "num_experts_per_tok" in refused({**QWEN_3_MOE, "num_experts_per_tok": 9})[0]
    assert "num_experts_per_tok" in refused(without(QWEN_3_MOE, "num_experts_per_tok"))[0]


def test_shares_of_experts_are_brought_to_a_sum_of_1_or_not() -> None:
    assert [read({**QWEN_3_MOE, "norm_topk_prob": value}).normalization_mode for value in (True, False, None)] == [1, 0, 0]
    (problem,) = refused({**QWEN_3_MOE, "norm_topk_prob": "false"})
    assert problem.startswith(f"{FILE}: norm_topk_prob: found 'false'; expected False or True")


@pytest.mark.parametrize(("said", "has"), [({}, True), ({"qkv_bias": True}, True), ({"qkv_bias": False}, False)])
def test_qwen2_moe_says_of_biases(said: dict[str, bool], has: bool) -> None:
    config = {**QWEN_3_MOE, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 32}
    assert read({**config, **said}).attn_bias is has


@pytest.mark.parametrize("value", [0, None])
@pytest.mark.parametrize("key", ["moe_intermediate_size", "shared_expert_intermediate_size"])
def test_experts_of_a_size_of_their_own_have_one(key: str, value: int | None) -> None:
    qwen_2 = {**QWEN_3_MOE, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 32}
    assert read(qwen_2).value(key)
    (problem,) = refused({**qwen_2, key: value})
    assert problem.startswith(f"{FILE}: {key}: found {'nothing' if value is None else 0}; expected 1 or more")


def test_a_single_expert_is_none_in_tensorrt_llm() -> None:
    """MoeConfig.has_moe asks for more than one."""
    single = {**MIXTRAL, "num_local_experts": 1, "num_experts_per_tok": 1}
    assert "num_local_experts: found 1; expected 2 or more" in refused(single)[0]


LEFT = [{"num_experts_per_tok": 2}, {"num_local_experts": 1, "num_experts_per_tok": 1}, {"num_local_experts": 0}]


@pytest.mark.parametrize("left", LEFT)
def test_what_a_dense_model_says_of_experts_is_not_its_own(left: dict[str, int]) -> None:
    assert read({**LLAMA, **left}) == read(LLAMA)


@pytest.mark.parametrize("model", [LLAMA, MIXTRAL, QWEN_3_MOE], ids=lambda model: model["model_type"])
def test_keys_of_modules_that_a_family_does_not_have_say_nothing(model: dict[str, Any]) -> None:
    assert read({**model, "parallel_attn_mlp_res": True}) == read(model)
    assert read({**model, "mlp_bias": True}).mlp_bias is (model is LLAMA)


def test_a_familys_own_name_stands_for_its_architectures() -> None:
    biases = {"attention_bias": True, "lm_head_bias": True}
    config = {**MIXTRAL, **biases, "architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"}
    assert read(config).architecture == "PhiMoEForCausalLM"
    assert read({**config, "architectures": ["PhiMoEForCausalLM"]}).architecture == "PhiMoEForCausalLM"
    assert read(LLAMA).architecture == "LlamaForCausalLM"
