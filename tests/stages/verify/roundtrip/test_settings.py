"""Each setting of config.json that a model is computed with is held against the source's own configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import plan
from stages.read import open_source
from stages.verify.roundtrip.original.config import canonical_config
from stages.verify.roundtrip.settings import check_settings
from tests.end_to_end.test_family_forward import CASES, build
from tests.support.checkpoints import LLAMA

Configs = tuple[dict[str, Any], dict[str, Any]]
FAMILIES = ("llama", "mistral", "mixtral", "granite", "granitemoe", "qwen2_moe", "qwen3", "qwen3_moe")
FAMILIES += ("phi3_long", "phi3_partial", "phimoe_long", "gemma", "gemma2", "gemma3", "ernie4_5", "helium", "seed_oss")
# A key of config.json, and another value than the model's.
OF_ALL: dict[str, Any] = {
    "norm_epsilon": 1e-3,
    "hidden_act": "relu",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_size": 7,
    "intermediate_size": 5,
    "vocab_size": 5,
    "num_hidden_layers": 9,
    "max_position_embeddings": 5,
    "rotary_embedding_dim": 2,
    "rotary_base": 1234.0,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"embedding_multiplier": 2.0, "attention_multiplier": 2.0, "residual_multiplier": 2.0, "output_multiplier_scale": 2.0},
    "granite": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "output_multiplier_scale": 1.0,
    },
    "mixtral": {"moe.top_k": 1, "moe.num_experts": 3, "moe.normalization_mode": 0},
    "qwen2_moe": {"moe.top_k": 1, "moe.normalization_mode": 1},
    "qwen3_moe": {"moe.top_k": 1, "moe.normalization_mode": 1},
    "phi3_long": {"original_max_position_embeddings": 5, "longrope_scaling_long_factors": [2.0]},
    "phi3_partial": {"rotary_pct": 1.0},
    "phimoe_long": {
        "moe.normalization_mode": 1,
        "moe.sparse_mixer_epsilon": 0.5,
        "longrope_short_mscale": 3.0,
        "longrope_long_mscale": None,
    },
    "gemma2": {"query_pre_attn_scalar": 5, "final_logit_softcapping": 7.0, "attn_logit_softcapping": None},
    "gemma3": {
        "query_pre_attn_scalar": 5,
        "rope_local_base_freq": 77.0,
        "final_logit_softcapping": 7.0,
        "_sliding_window_pattern": 3,
    },
}
CHANGES = [("granite", key, value) for key, value in OF_ALL.items()]
CHANGES += [(family, key, value) for family, changes in OWN.items() for key, value in changes.items()]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Configs]:
    """The config.json that a model becomes, and the model's own as transformers has it; made once."""
    made: dict[str, Configs] = {}

    def make(name: str) -> Configs:
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            build(CASES[name]).to(torch.bfloat16).save_pretrained(place / "model")
            (target,) = plan(model_dir=place / "model", output_dir=place / "ranks").targets
            made[name] = json.loads(target.output.config), canonical_config(open_source(place / "model"))
        return made[name]

    return make


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    table, _, inner = key.rpartition(".")
    return {**config, table: {**config[table], inner: value}} if table else {**config, key: value}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_plan_writes_is_right(family: str, configs: Callable[[str], Configs]) -> None:
    config, source = configs(family)
    assert list(check_settings(config, source, {})) == []


@pytest.mark.parametrize(("family", "key", "value"), CHANGES)
def test_another_value_is_named(family: str, key: str, value: Any, configs: Callable[[str], Configs]) -> None:
    config, source = configs(family)
    found = [problem.subject for problem in check_settings(changed(config, key, value), source, {})]
    assert f"config.json: {key}" in found


def test_what_the_conversion_was_told_counts(configs: Callable[[str], Configs]) -> None:
    config, source = configs("llama")
    told = changed(config, "max_position_embeddings", 77)
    assert list(check_settings(told, source, {"max_position_embeddings": 77})) == []
    assert list(check_settings(told, source, {"max_position_embeddings": 78}))


# Rope: a key that is missing has the value that its reader takes.

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LENGTH = "original_max_position_embeddings"


def rope(theirs: dict[str, Any] | None, ours: dict[str, Any] | None, **more: Any) -> list[str]:
    """The subjects of what is wrong with LLaMA's positions. `more`: keys of config.json."""
    config = {"architecture": "LlamaForCausalLM", "num_hidden_layers": 3, "rotary_base": 10000.0, "rotary_scaling": ours, **more}
    source = {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": theirs}
    return [problem.subject.removeprefix("config.json: ") for problem in check_settings(config, source, {})]


@pytest.mark.parametrize(
    ("theirs", "ours", "wrong"),
    [
        ({**LLAMA3, LENGTH: 8192}, {"type": "llama3"}, "factor"),
        ({**LLAMA3, "factor": 8.0, LENGTH: 8192}, {"type": "llama3"}, ""),
        ({**LLAMA3, "factor": 8.0}, {"type": "llama3"}, LENGTH),  # the model's own 4096, and the class's 8192
        ({**LLAMA3, "factor": 8.0, "high_freq_factor": 5.0, LENGTH: 8192}, {"type": "llama3"}, "high_freq_factor"),
        ({**YARN, LENGTH: 4096}, {"type": "yarn", "factor": 4.0}, ""),
        (YARN, {"type": "yarn", "factor": 4.0}, ""),
        ({**YARN, LENGTH: 2048}, {"type": "yarn", "factor": 4.0}, LENGTH),
        ({**YARN, "beta_fast": 16}, {"type": "yarn", "factor": 4.0}, "beta_fast"),
        ({**YARN, "beta_fast": 32, "beta_slow": 1}, {"type": "yarn", "factor": 4.0}, ""),
        (YARN, {"type": "yarn", "factor": 4.0, "beta_slow": 2}, "beta_slow"),
        ({**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}, {"type": "yarn", "factor": 4.0}, "mscale"),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}, ""),
        ({**YARN, "attention_factor": 1.5}, {"type": "yarn", "factor": 4.0}, "mscale"),
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2}, ""),
    ],
    ids=str,
)
def test_keys_of_a_scaling_that_are_missing(theirs: dict[str, Any], ours: dict[str, Any], wrong: str) -> None:
    assert rope(theirs, ours) == ([f"rotary_scaling.{wrong}"] if wrong else [])


def test_a_base_that_is_missing_is_the_class_s() -> None:
    source = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config = {"architecture": "LlamaForCausalLM", "num_hidden_layers": 3, "rotary_base": 500000.0}
    assert [problem.subject for problem in check_settings(config, source, {})] == ["config.json: rotary_base"]
    assert list(check_settings({**config, "rotary_base": 10000}, source, {})) == []
    # A scaling that was left out on request changes no base.
    assert list(check_settings(config, source, {"rope_scaling": "none"}))


@pytest.mark.parametrize(("length", "right"), [(4096, True), (2048, False), (None, False)])
def test_the_original_length_of_a_long_rope(length: int | None, right: bool, configs: Callable[[str], Configs]) -> None:
    config, source = configs("phi3_long")
    meant = config[LENGTH]
    found = list(check_settings({**config, LENGTH: meant if right else length}, source, {}))
    assert (found == []) == right


def test_a_configuration_of_the_disk(configs: Callable[[str], Configs], tmp_path: Path) -> None:
    """Numbers that JSON has as whole ones are the same."""
    config, source = configs("granite")
    (tmp_path / "config.json").write_text(json.dumps({**config, "embedding_multiplier": int(config["embedding_multiplier"])}))
    again = json.loads((tmp_path / "config.json").read_text())
    assert list(check_settings(again, source, {})) == []
