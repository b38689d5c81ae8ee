"""The attention windows of a model's layers, as its configuration class in transformers has them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model.config_values import assumed_notes
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import find_family
from pipeline.model.windows import attention_windows, check_windows, with_pattern
from stages.verify.roundtrip.settings import check_settings
from tests.support.checkpoints import LLAMA

FILE = "config.json"
LONG = {**LLAMA, "max_position_embeddings": 32768}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


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


@pytest.mark.parametrize("left", [{"sliding_window": 512}, {"sliding_window": 512, "layer_types": ["sliding_attention"] * 3}])
def test_verification_knows_that_llama_has_no_window_whatever_is_left_over(left: dict[str, Any]) -> None:
    assert attention_windows(read("LlamaForCausalLM", **left)) == ()
    config = {**LONG, "architecture": "LlamaForCausalLM", "rotary_base": 10000.0, "runtime_defaults": None}
    assert list(check_settings(config, {**LONG, **left}, {})) == []


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM"])
@pytest.mark.parametrize(("said", "used"), [({}, False), (None, False), (False, False), (True, True)])
def test_a_window_that_is_used_on_request(architecture: str, said: Any, used: bool) -> None:
    request = said if isinstance(said, dict) else {"use_sliding_window": said}
    model = read(architecture, sliding_window=512, max_window_layers=2, **EXPERTS, **request)
    assert check_windows(model, FILE) == []
    assert bool(attention_windows(model)) == used


def test_qwen2_vl_has_the_defaults_of_its_own_class() -> None:
    """Of 81 layers the last alone has the window, as 80 is the default of max_window_layers."""
    name, values = "Qwen2VLForConditionalGeneration", {"use_sliding_window": True, "sliding_window": 512, "num_hidden_layers": 81}
    family = find_family("huggingface", name)
    assert family is not None
    source = {key: value for key, value in {**LONG, **values}.items() if key != "rope_theta"}
    model = model_config(source, family, name, FILE)
    assert (model.rotary_base, attention_windows(model)) == (1000000.0, (*[32768] * 80, 512))
    written = {"architecture": name, "rotary_base": 1000000.0, "runtime_defaults": {"max_attention_window": [*[32768] * 80, 512]}}
    assert list(check_settings({**LONG, "num_hidden_layers": 81, **written}, source, {})) == []


GEMMA_3 = {"hidden_act": "gelu", "num_hidden_layers": 6, "sliding_window": 512}
PATTERN_OF_3 = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def checked(architecture: str, **values: Any) -> tuple[ModelConfig, list[str]]:
    """A model with the pattern of its layers, and what is wrong with its windows."""
    family = find_family("huggingface", architecture)
    assert family is not None
    config = {**LONG, **values}
    model = with_pattern(model_config(config, family, architecture, FILE), config, family)
    return model, [str(problem) for problem in check_windows(model, FILE)]


@pytest.mark.parametrize("said", [{}, {"sliding_window_pattern": None}, {"_sliding_window_pattern": None}])
@pytest.mark.parametrize(
    ("types", "pattern"),
    [
        (PATTERN_OF_3, 3),
        (["sliding_attention"] * 5 + ["full_attention"], 6),
        (["full_attention"] * 6, 1),
    ],
)
def test_a_pattern_is_that_of_the_layers(types: list[str], pattern: int, said: dict[str, Any]) -> None:
    model, problems = checked("Gemma3ForCausalLM", **GEMMA_3, layer_types=types, **said)
    assert (model.settings["sliding_window_pattern"], problems) == (pattern, [])
    assert len(set(attention_windows(model))) == (pattern > 1) * 2


@pytest.mark.parametrize("said", [{}, {"sliding_window_pattern": None}])
def test_layers_that_all_see_the_window_are_before_the_end_of_a_pattern(said: dict[str, Any]) -> None:
    few = {**GEMMA_3, "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3}
    model, problems = checked("Gemma3ForCausalLM", **few, **said)
    assert (model.settings["sliding_window_pattern"] > 3, problems) == (True, [])
    assert attention_windows(model) == (512,)


def test_layers_of_no_pattern_and_of_another_than_is_said_are_refused() -> None:
    irregular = [*PATTERN_OF_3[:4], "full_attention", "full_attention"]
    for types, said in [(irregular, {}), (PATTERN_OF_3, {"sliding_window_pattern": 2})]:
        (problem,) = checked("Gemma3ForCausalLM", **GEMMA_3, layer_types=types, **said)[1]
        assert problem.startswith(f"{FILE}: layer_types: found another order of layers")
    (problem,) = checked("Gemma3ForCausalLM", **GEMMA_3, layer_types=irregular, sliding_window_pattern=None)[1]
    assert problem.startswith(f"{FILE}: sliding_window_pattern: found None; expected a whole number")


@pytest.mark.parametrize(
    ("architecture", "values", "key"),
    [
        ("Gemma3ForCausalLM", {**GEMMA_3, "sliding_window_pattern": None}, "sliding_window_pattern"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": None}, "max_window_layers"),
        ("Qwen2MoeForCausalLM", {**EXPERTS, "use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
    ],
)
def test_a_null_that_windows_need_is_a_problem(architecture: str, values: dict[str, Any], key: str) -> None:
    (problem,) = checked(architecture, **values)[1]
    assert problem.startswith(f"{FILE}: {key}: found None; expected a whole number: it says which layers see the window alone")


@pytest.mark.parametrize(
    "values",
    [
        {"use_sliding_window": False, "sliding_window": 512},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["sliding_attention"] * 3},
    ],
)
def test_a_null_that_no_window_needs_is_none(values: dict[str, Any]) -> None:
    assert checked("Qwen2ForCausalLM", **values, max_window_layers=None)[1] == []


def test_verification_ends_in_no_traceback_of_a_null() -> None:
    source = {**LONG, "use_sliding_window": True, "max_window_layers": None}
    assert list(check_settings({**LONG, "architecture": "Qwen2ForCausalLM", "rotary_base": 10000.0}, source, {})) == []
