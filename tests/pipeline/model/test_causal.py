"""A model whose tokens see those behind them is refused, whatever its family: the engine would be a causal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.model.causal import check_causal
from tests.support import checkpoints
from tests.support.commands import one, refused

BOTH_WAYS = [("is_causal", False), ("use_bidirectional_attention", True), ("use_bidirectional_attention", "all")]


@pytest.mark.parametrize(("key", "value"), [*BOTH_WAYS, ("is_causal", "false"), ("is_causal", 0), ("attention.causal", False)])
def test_tokens_behind_are_named_by_their_key(key: str, value: Any) -> None:
    (problem,) = check_causal({key: value}, "config.json")
    assert str(problem).startswith(f"config.json: {key}: found {value!r}; expected {key != 'use_bidirectional_attention'}: ")


CAUSAL = [{"is_causal": True, "use_bidirectional_attention": False}, {"is_causal": None, "use_bidirectional_attention": None}]


@pytest.mark.parametrize("config", [{}, *CAUSAL])
def test_a_causal_model_is_none_of_them(config: dict[str, Any]) -> None:
    assert check_causal(config, "config.json") == []


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize(("key", "value"), BOTH_WAYS)
def test_a_plan_refuses_it(architecture: str, key: str, value: Any, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**checkpoints.LLAMA, "architectures": [architecture], key: value})
    assert f"{key}: found {value!r}" in one(refused(tmp_path / "model"))


def test_a_wrapper_says_it_of_its_text(tmp_path: Path) -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": checkpoints.LLAMA, "is_causal": False}
    checkpoints.save(tmp_path / "model", config, checkpoints.values(checkpoints.LLAMA))
    assert "is_causal: found False" in one(refused(tmp_path / "model"))
