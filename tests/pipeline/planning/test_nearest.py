"""An architecture that no family is for: the nearest families and what differs from each, or the text model that it wraps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.model.runtime import runtime
from pipeline.model.tables import families
from pipeline.planning.nearest import unknown_architecture
from pipeline.tensor.tensors import Source
from tests.support import checkpoints
from tests.support.checkpoints import LLAMA
from tests.support.commands import one, refused
from tests.support.lazy import held
from tests.support.shapes import shapes

NAMES = list(checkpoints.shapes(LLAMA))


def said(config: dict[str, Any], names: list[str] = NAMES) -> str:
    """The remedy for a configuration whose architecture nothing knows, with tensors of these names."""
    tensors = held(dict.fromkeys(names, np.zeros(1, np.float16)))
    config = {"model_type": "new", **config}
    source = Source("a test", Path("model"), "huggingface", "NewForCausalLM", config, "config.json", tensors, (), None)
    problem = unknown_architecture(source)
    assert problem.found == "NewForCausalLM"
    return problem.remedy


def test_what_differs_in_nothing_is_left_to_whoever_knows_its_code() -> None:
    told = said(LLAMA)
    assert told.startswith("Nothing in its configuration and its tensors' names differs from the family llama.")
    assert '["LlamaForCausalLM"]' in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"hidden_act": "relu2"}, "the activation (relu2)"),
        ({"layer_norm_eps": 1e-5}, "norms (layer_norm_eps)"),
        ({"partial_rotary_factor": 0.5}, "positions (partial_rotary_factor)"),
        ({"use_qkv_bias": True}, "biases (use_qkv_bias)"),
        ({"kv_lora_rank": 512}, "latent attention (MLA) (kv_lora_rank)"),
        ({"num_experts": 8, "n_shared_experts": 2}, "experts (num_experts), shared experts (n_shared_experts)"),
        ({"rope_scaling": {"llama_4_scaling_beta": 0.1}}, "positions (rope_scaling.llama_4_scaling_beta)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_key_of_the_configuration_that_the_family_does_not_read_is_named(more: dict[str, Any], told: str) -> None:
    assert f"The nearest family is llama, but for {told}: " in said({**LLAMA, **more})


@pytest.mark.parametrize("more", [{"kv_lora_rank": None}, {"use_qkv_bias": False}, {"partial_rotary_factor": 1.0}])
def test_a_key_that_says_nothing_is_no_difference(more: dict[str, Any]) -> None:
    assert said({**LLAMA, **more}).startswith("Nothing in ")


def test_names_of_tensors_tell_what_a_configuration_does_not() -> None:
    names = [name.replace("q_proj", "all_proj") for name in NAMES if "k_proj" not in name and "v_proj" not in name]
    told = said(LLAMA, [*names, "model.norm.bias"])
    assert "tensors that it does not have (model.layers.{}.self_attn.all_proj, model.norm.bias)" in told
    assert "the lack of model.layers.{}.self_attn.k_proj, model.layers.{}.self_attn.q_proj, model.layers.{}" in told


def test_names_that_tell_nothing_leave_it_to_the_configuration() -> None:
    assert said(LLAMA, ["one.weight"]).startswith("Nothing in its configuration differs from the family llama.")


@pytest.mark.parametrize("key", ["text_config", "llm_config", "thinker_config.text_config"])
@pytest.mark.parametrize("told", ["architectures", "model_type"])
def test_a_wrapper_names_its_text_part(key: str, told: str) -> None:
    inner: Any = {name: value for name, value in LLAMA.items() if name not in ("architectures", "model_type")}
    inner[told] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}[told]
    for part in reversed(key.split(".")):
        inner = {part: inner}
    remedy = said({"vision_config": {"hidden_size": 8, "num_hidden_layers": 2}, **inner}, ["language_model.model.norm.weight"])
    assert f"It wraps a text model of the family mistral ({key}: " in remedy
    assert remedy.endswith(f'with {key} as its config.json, where `architectures` is ["MistralForCausalLM"]')


def test_a_text_part_that_no_family_is_for_is_told_from_the_nearest_too() -> None:
    inner = {**LLAMA, "architectures": ["OtherForCausalLM"], "kv_lora_rank": 64}
    told = said({"text_config": inner}, [])
    assert "(text_config: OtherForCausalLM), which no family is for either. The nearest family is llama, but for latent" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("OrionStarAI/Orion-14B-Chat", "llama, but for tensors that it does not have (model.layers.{}.input_layernorm.bias, "),
        ("mistralai/Ministral-3-3B-Instruct-2512 (Mistral3, real config)", "llama, but for positions (rope_parameters.llama_4_"),
        ("CohereForAI/aya-23-8B", "llama, but for norms (layer_norm_eps), multipliers (logit_scale), the lack of "),
    ],
)
def test_published_models_are_told_from_their_nearest_family(name: str, told: str, tmp_path: Path) -> None:
    assert f"The nearest family is {told}" in one(refused(shapes()[name].build(tmp_path / "model")))


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        (
            "GptOssForCausalLM",
            "The engine backend of TensorRT-LLM has no class that computes it. TensorRT-LLM's PyTorch backend takes",
        ),
        (
            "CohereForCausalLM",
            "TensorRT-LLM has a class of its own for it, whose layout headrace does not write. NVIDIA's own converter",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_why_no_family_is_for_an_architecture_is_said_where_it_is_known(architecture: str, told: str, wrapped: bool) -> None:
    config = {**LLAMA, "architectures": [architecture]}
    tensors = held(dict.fromkeys(NAMES, np.zeros(1, np.float16)))
    whole = {"architectures": ["Wrapper"], "text_config": config} if wrapped else config
    name = "Wrapper" if wrapped else architecture
    problem = unknown_architecture(Source("test", Path("m"), "huggingface", name, whole, "config.json", tensors, (), None))
    assert problem.remedy.startswith(told)
    assert not set(runtime().unserved) & {each for family in families() for each in family.architectures}


def test_hostile_values_are_text(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        **LLAMA,
        "architectures": ["{0}"],
        "model_type": ["x"],
        "hidden_act": "\x1b[1m" * 99,
        "text_config": {"{}": {}},
    }
    checkpoints.write(model := tmp_path / "model", LLAMA)
    (model / "config.json").write_text(json.dumps(config))
    problem = one(refused(model))
    assert "\x1b" not in problem
    assert len(problem) < 2000
