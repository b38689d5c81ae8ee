"""The attention windows of a model's layers, as its configuration class in transformers has them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model.config_values import assumed_notes
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import find_family
from pipeline.model.windows import attention_windows, check_windows
from stages.verify.roundtrip.settings import check_settings
from tests.support.checkpoints import LLAMA

FILE = "config.json"
LONG = {**LLAMA, "max_position_embeddings": 32768}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def read(architecture: str, **values: Any) -> ModelConfig:
    family = find_family("huggingface", architecture)
    assert family is not None
    return model_config({**LONG, **values}, family, architecture, FILE)


def test_mistral_without_the_key_has_the_window_of_its_class() -> None:
    model = read("MistralForCausalLM")
    assert (attention_windows(model), check_windows(model, FILE)) == ((4096,), [])
    family = find_family("huggingface", "MistralForCausalLM")
    assert family is not None
    assert "sliding_window 4096: config.json has no sliding_window, and transformers' default is this" in assumed_notes(
        LONG, family, FILE
    )


@pytest.mark.parametrize(("window", "windows"), [(None, ()), (512, (512,)), (32768, ()), (0, ())])
def test_mistral_with_the_key_has_what_it_says(window: int | None, windows: tuple[int, ...]) -> None:
    assert attention_windows(read("MistralForCausalLM", sliding_window=window)) == windows
    family = find_family("huggingface", "MistralForCausalLM")
    assert family is not None
    assert not any("sliding_window" in note for note in assumed_notes({**LONG, "sliding_window": window}, family, FILE))


@pytest.mark.parametrize(
    ("source", "written", "wrong"),
    [({}, [4096], False), ({}, None, True), ({"sliding_window": None}, None, False), ({"sliding_window": None}, [4096], True)],
)
def test_verification_knows_mistrals_window_too(source: dict[str, Any], written: list[int] | None, wrong: bool) -> None:
    runtime_defaults = None if written is None else {"max_attention_window": written}
    config = {**LONG, "architecture": "MistralForCausalLM", "rotary_base": 10000.0, "runtime_defaults": runtime_defaults}
    assert bool(list(check_settings(config, {**LONG, **source}, {}))) == wrong


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM"])
@pytest.mark.parametrize(("said", "used"), [({}, False), (None, False), (False, False), (True, True)])
def test_a_window_that_is_used_on_request(architecture: str, said: Any, used: bool) -> None:
    request = said if isinstance(said, dict) else {"use_sliding_window": said}
    model = read(architecture, sliding_window=512, max_window_layers=2, **EXPERTS, **request)
    assert check_windows(model, FILE) == []
    assert bool(attention_windows(model)) == used


def test_qwen2_vl_has_the_defaults_of_its_own_class() -> None:
    """Of 81 layers the last alone has the window, as 80 is the default of max_window_layers."""
    values = {"use_sliding_window": True, "sliding_window": 512, "num_hidden_layers": 81}
    model = read("Qwen2VLForConditionalGeneration", rope_theta=None, **values)
    assert (model.rotary_base, attention_windows(model)) == (1000000.0, (*[32768] * 80, 512))
    written = {"max_attention_window": list(attention_windows(model))}
    config = {
        **LONG,
        "rotary_base": 10000.0,
        "architecture": "Qwen2VLForConditionalGeneration",
        "num_hidden_layers": 81,
        "runtime_defaults": written,
    }
    assert list(check_settings(config, {**LONG, **values}, {})) == []
