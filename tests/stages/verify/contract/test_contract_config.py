"""contract: what is wrong with a config.json is said by its key, and nothing in one makes it raise."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from stages.verify.contract import contract
from tests.goldens.differences import as_1_2_reads
from tests.stages.verify.contract.test_contract import GEMMA_3, LLAMA, MIXTURE, PHI_MOE, QWEN_MOE, mapped
from tests.support.examples import examples
from tests.support.places import DATA

CONFIGS = {
    path.parent.name: as_1_2_reads(json.loads(path.read_text()), f"{path.parents[2].name}/{path.parent.name}")
    for path in sorted(DATA.glob("*/expected/*/config.json"))
}
QWEN_3 = {**LLAMA, "architecture": "Qwen3ForCausalLM", "qwen_type": "qwen3"}
PHI_3 = {**LLAMA, "architecture": "Phi3ForCausalLM", "hidden_act": "swiglu", "hidden_size": 192, "rotary_pct": 1.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
QWEN_2_VL = {
    **LLAMA,
    "architecture": "Qwen2VLForConditionalGeneration",
    "qwen_type": "qwen2_vl",
    "position_embedding_type": "mrope",
}
LONG = {
    "position_embedding_type": "long_rope",
    "original_max_position_embeddings": 64,
    "longrope_scaling_short_factors": [1.0] * 12,
    "longrope_scaling_long_factors": [2.0] * 12,
}


def changed(config: dict[str, Any], key: str, value: Any = None, *, remove: bool = False) -> dict[str, Any]:
    """A copy with one key, `a.b` for one of a table's, set or removed."""
    result = copy.deepcopy(config)
    table = result
    *tables, last = key.split(".")
    for name in tables:
        table = table.setdefault(name, {})
    if remove:
        table.pop(last)
    else:
        table[last] = value
    return result


def test_there_are_configurations() -> None:
    assert len(CONFIGS) > 80


@pytest.mark.parametrize("name", CONFIGS)
def test_every_version_of_the_reference_is_understood(name: str) -> None:
    config = CONFIGS[name]
    ranks, problems = contract(config)
    assert problems == []
    assert len(ranks) == config["mapping"]["world_size"]


# Blocks as versions from 0.13 to 1.2.1 write them.
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gpus_per_node": 8, "cp_size": 1, "moe_tp_size": 4, "moe_ep_size": 1},
        {"moe_tp_size": -1, "moe_ep_size": -1, "moe_cluster_size": -1, "attn_tp_size": -1, "attn_cp_size": -1},
        {"moe_cluster_size": 1, "attn_tp_size": 4, "attn_cp_size": 1, "auto_parallel": False, "rank": 0},
        {"cp_config": {}, "enable_attention_dp": False, "enable_lm_head_tp_in_adp": False, "pp_partition": None},
        {"pp_partition": [1, 4]},
    ],
)
def test_mappings_of_every_version(more: dict[str, Any]) -> None:
    ranks, problems = contract(mapped({**MIXTURE, "quantization": None}, tp=4, pp=2, **more))
    assert problems == []
    layers = [sum(name.endswith("input_layernorm.weight") for name in rank) for rank in ranks]
    assert layers == ([1] * 4 + [4] * 4 if more.get("pp_partition") else [3] * 4 + [2] * 4)


WRONG: list[tuple[dict[str, Any], str, Any]] = [
    (mapped(LLAMA, tp=2), "architecture", "FalconForCausalLM"),
    (mapped(LLAMA), "architecture", ["LlamaForCausalLM"]),
    (mapped(LLAMA), "dtype", "int8"),
    (mapped(LLAMA), "hidden_size", "64"),
    (mapped(LLAMA), "hidden_size", 64.0),
    (mapped(LLAMA), "vocab_size", True),
    (mapped(LLAMA), "vocab_size", -1),
    (mapped(LLAMA), "num_hidden_layers", 0),
    (mapped(LLAMA), "num_hidden_layers", 10**9),
    (mapped(LLAMA), "norm_epsilon", 0),
    (mapped(LLAMA), "rotary_base", float("nan")),
    (mapped(LLAMA), "position_embedding_type", "alibi"),
    (mapped(LLAMA), "attn_bias", "yes"),
    (mapped(LLAMA), "embedding_sharding_dim", 2),
    (mapped(LLAMA), "residual_mlp", True),
    (mapped(LLAMA), "use_last_layernorm", False),
    (mapped(LLAMA), "mapping", None),
    (mapped(LLAMA), "mapping", [1, 1]),
    (mapped(LLAMA, tp=2), "mapping.world_size", 4),
    (mapped(LLAMA, tp=2), "mapping.world_size", 1 << 40),
    (mapped(LLAMA, tp=2), "mapping.moe_tp_size", 3),
    (mapped(LLAMA, tp=2), "mapping.moe_ep_size", 0),
    (mapped(LLAMA, tp=2), "mapping.moe_cluster_size", 2),
    (mapped(LLAMA, tp=2), "mapping.attn_cp_size", 2),
    (mapped(LLAMA, tp=2), "mapping.attn_tp_size", 3),
    (mapped(LLAMA, tp=2), "mapping.cp_config", "ulysses"),
    (mapped(LLAMA, tp=2), "mapping.enable_attention_dp", True),
    (mapped(LLAMA, tp=2), "mapping.tp_rank", 0),
    (mapped(LLAMA, pp=2), "mapping.pp_partition", [1, 1]),
    (mapped(LLAMA, pp=2), "mapping.pp_partition", [5, 0]),
    (mapped(LLAMA), "quantization", "W8A16"),
    (mapped(LLAMA), "quantization.quant_algo", "W4A8_AWQ"),
    (mapped(LLAMA), "quantization.quant_algo", {}),
    (mapped(LLAMA), "quantization.kv_cache_quant_algo", "NVFP4"),
    (mapped(LLAMA), "quantization.group_size", 0),
    (mapped(LLAMA), "quantization.clamp_val", [1]),
    (mapped(LLAMA), "quantization.exclude_modules", "lm_head"),
    (mapped({**LLAMA, "quantization": {"quant_algo": "FP8"}}), "quantization.exclude_modules", ["*router"]),
    (mapped(LLAMA), "quantization.has_zero_point", 1),
    (mapped(LLAMA), "quantization.sq_use_plugin", False),
    (mapped(MIXTURE), "moe", None),
    (mapped(MIXTURE), "moe.num_experts", 0),
    (mapped(MIXTURE), "moe.top_k", 9),
    (mapped(MIXTURE), "moe.num_local_experts", 8),
    (mapped(QWEN_MOE), "moe_intermediate_size", None),
    (mapped(QWEN_MOE), "moe_shared_expert_intermediate_size", 0),
    (mapped(QWEN_MOE), "qwen_type", "qwen2"),
    (mapped(QWEN_3), "qwen_type", None),
    (mapped(PHI_3), "moe", {"num_experts": 2, "top_k": 2}),
    (mapped({**PHI_3, **LONG}), "longrope_scaling_long_factors", [1.0]),
    (mapped({**PHI_3, **LONG}), "original_max_position_embeddings", None),
    (mapped({**PHI_MOE, **LONG, "longrope_long_mscale": 1.0}), "longrope_short_mscale", "1"),
    (mapped(GEMMA_3), "query_pre_attn_scalar", None),
    (mapped(GEMMA_3), "_sliding_window_pattern", [6]),
    (mapped(GEMMA_3), "final_logit_softcapping", "30"),
    (mapped(PHI_3), "rotary_pct", None),
    (mapped(PHI_3), "rotary_pct", 0),
    (mapped(PHI_3), "rotary_pct", 1.5),
    (mapped({**PHI_3, **LONG}), "longrope_scaling_long_factors", ["1"] * 12),
    (mapped({**PHI_3, **LONG}), "original_max_position_embeddings", 1),
    (mapped(QWEN_3), "use_logn_attn", True),
    (mapped(QWEN_MOE), "decoder_sparse_step", 2),
    (mapped(QWEN_MOE), "mlp_only_layers", [1]),
    (mapped(MIXTURE), "moe.normalization_mode", "1"),
    (mapped(MIXTURE), "moe.sparse_mixer_epsilon", None),
    (mapped(LLAMA), "rotary_embedding_dim", 7),
    (mapped(LLAMA), "norm_epsilon", 10**400),
    (mapped(LLAMA), "residual_multiplier", None),
    (mapped(LLAMA), "attention_multiplier", [1.0]),
    (mapped(LLAMA), "quantization.clamp_val", [-1.0, 10**400]),
    (mapped({**LLAMA, "rotary_scaling": {"type": "llama3"}}), "rotary_scaling.low_freq_factor", "1"),
    (mapped({**LLAMA, "rotary_scaling": {"type": "linear"}}), "rotary_scaling.factor", -2.0),
    (mapped({**LLAMA, "rotary_scaling": {**YARN}}), "rotary_scaling.attention_factor", 10**400),
    (mapped({**QWEN_2_VL}), "rotary_scaling", {"type": "mrope", "mrope_section": ["4", 4, 4]}),
]


@pytest.mark.parametrize(("config", "key", "value"), WRONG, ids=[f"{key}={str(value)[:20]}" for _, key, value in WRONG])
def test_what_is_wrong_is_said_by_its_key(config: dict[str, Any], key: str, value: Any) -> None:
    _, problems = contract(changed(config, key, value))
    assert f"config.json: {key}" in [problem.subject for problem in problems], problems


@pytest.mark.parametrize(
    "key",
    [
        "architecture",
        "dtype",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "norm_epsilon",
        "rotary_base",
        "position_embedding_type",
        "max_position_embeddings",
        "mapping",
        "mapping.world_size",
        "mapping.tp_size",
        "mapping.pp_size",
        "quantization.quant_algo",
    ],
)
def test_what_is_missing_is_said(key: str) -> None:
    _, problems = contract(changed(mapped(LLAMA), key, remove=True))
    assert [(problem.subject, problem.found) for problem in problems] == [(f"config.json: {key}", "no such key")]


def test_an_empty_mapping_lacks_its_sizes() -> None:
    _, problems = contract({**LLAMA, "mapping": {}})
    assert [problem.subject for problem in problems] == [
        f"config.json: mapping.{key}" for key in ("world_size", "tp_size", "pp_size")
    ]


def test_a_missing_head_size_is_told_by_the_others() -> None:
    ranks, problems = contract(changed(mapped(LLAMA), "head_size", remove=True))
    assert problems == []
    assert str(ranks[0]["transformer.layers.0.attention.qkv.weight"]) == "bfloat16 [96, 64]"
    _, problems = contract(changed(mapped({**LLAMA, "num_attention_heads": 6}), "head_size", remove=True))
    assert [problem.subject for problem in problems] == ["config.json: head_size"]


# What the ranks cannot share out.
@pytest.mark.parametrize(
    ("config", "key"),
    [
        (mapped({**LLAMA, "num_key_value_heads": 1}, tp=3), "num_attention_heads"),
        (mapped({**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 6}, tp=4), "num_key_value_heads"),
        (mapped({**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 4}, tp=6), "num_key_value_heads"),
        (mapped({**LLAMA, "num_key_value_heads": 16}), "num_key_value_heads"),
        (mapped({**LLAMA, "intermediate_size": 98}, tp=4), "intermediate_size"),
        (mapped({**LLAMA, "hidden_size": 66, "use_parallel_embedding": True, "embedding_sharding_dim": 1}, tp=4), "hidden_size"),
        (mapped(LLAMA, pp=6), "mapping.pp_size"),
        (mapped({**MIXTURE, "moe": {"num_experts": 6, "top_k": 2}}, tp=4, moe_ep_size=4), "moe.num_experts"),
        (mapped({**MIXTURE, "intermediate_size": 98}, tp=4), "intermediate_size"),
        (mapped({**QWEN_MOE, "moe_intermediate_size": 50}, tp=4), "moe_intermediate_size"),
        (
            mapped({**QWEN_MOE, "moe_shared_expert_intermediate_size": 50}, tp=4, moe_ep_size=4),
            "moe_shared_expert_intermediate_size",
        ),
        (mapped({**LLAMA, "dtype": "float32", "quantization": {"quant_algo": "FP8"}}), "dtype"),
        ({**MIXTURE, "mapping": {"world_size": 2, "tp_size": 1, "pp_size": 1, "cp_size": 2}}, "mapping.cp_size"),
    ],
)
def test_sizes_that_do_not_divide(config: dict[str, Any], key: str) -> None:
    _, problems = contract(config)
    assert [problem.subject for problem in problems] == [f"config.json: {key}"]


def test_context_parallel_ranks_share_files() -> None:
    ranks, problems = contract({**LLAMA, "mapping": {"world_size": 8, "tp_size": 2, "pp_size": 2, "cp_size": 2}})
    assert (len(ranks), problems) == (4, [])


# --- whatever is in it

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([2, 64, 1 << 62]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BASES = [*CONFIGS.values(), mapped({**PHI_MOE, **LONG}), mapped(GEMMA_3), mapped(QWEN_MOE)]


@examples(400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(BASES), st.data())
def test_nothing_makes_it_raise(base: dict[str, Any], data: st.DataObject) -> None:
    config = copy.deepcopy(base)
    for _ in range(data.draw(st.integers(1, 3))):
        table = data.draw(st.sampled_from([config, *(inner for inner in config.values() if isinstance(inner, dict))]))
        key = data.draw(st.sampled_from(sorted(table)) if table else st.just("x"))
        if data.draw(st.booleans()):
            table[key] = data.draw(VALUES)
        else:
            table.pop(key, None)
    ranks, problems = contract(config)
    assert all(str(problem).startswith("config.json: ") for problem in problems)
    assert ranks or problems
    if ranks:
        assert len(ranks) == config["mapping"]["tp_size"] * config["mapping"]["pp_size"]


@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=6))
def test_nor_does_any_other_object(config: dict[str, Any]) -> None:
    ranks, problems = contract(config)
    assert ranks == []
    assert problems


def test_what_cannot_be_written_out() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**5000):
        _, problems = contract(changed(mapped(LLAMA), "hidden_size", value))
        assert "cannot be written out" in next(each.found for each in problems if each.subject == "config.json: hidden_size")


@pytest.mark.parametrize("config", [QWEN_3, {**QWEN_3, "moe": {"num_experts": 1, "top_k": 1}}], ids=["dense", "one expert"])
def test_layers_without_experts_say_nothing_of_a_dense_model(config: dict[str, Any]) -> None:
    _, problems = contract(mapped({**config, "decoder_sparse_step": 2, "mlp_only_layers": [1], "use_logn_attn": False}))
    assert problems == []
