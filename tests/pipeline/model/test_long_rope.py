"""A long rope's parameters, as transformers reads them and TensorRT-LLM's Phi class computes them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.model.computes import conflicts
from pipeline.model.long_rope import check_long_rope
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import find_family
from pipeline.model.written_rope import written_scaling
from tests.support.checkpoints import LLAMA, MIXTRAL

LENGTH = "original_max_position_embeddings"
PHI_3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 32768}
PHI_MOE = {**MIXTRAL, "architectures": ["PhimoeForCausalLM"], "attention_bias": True, "lm_head_bias": True}
LISTS = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
MOE = {**LISTS, "short_mscale": 1.1, "long_mscale": 1.3}
# Of 32768 positions behind 4096.
FORMULA = math.sqrt(1 + math.log(8) / math.log(4096))


def read(config: dict[str, Any]) -> ModelConfig:
    family = find_family("huggingface", config["architectures"][0])
    assert family is not None
    return model_config(config, family, config["architectures"][0], "config.json")


def written(model: ModelConfig, mode: Any = "auto") -> tuple[Any, str]:
    family = find_family("huggingface", "Phi3ForCausalLM")
    assert family is not None
    return written_scaling(model, family, mode)


def problems(config: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in check_long_rope(read(config), "config.json")]


@pytest.mark.parametrize("mode", ["auto", "keep"])
@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({**PHI_3, "rope_scaling": LISTS}, 4096),
        ({**PHI_MOE, "rope_scaling": MOE}, MIXTRAL["max_position_embeddings"]),
    ],
    ids=["Phi-3", "PhiMoE"],
)
def test_a_length_that_is_missing_is_transformers_own(config: dict[str, Any], length: int, mode: str) -> None:
    model = read(config)
    assert problems(config) == []
    scaling, note = written(model, mode)
    assert scaling == {**config["rope_scaling"], LENGTH: length}
    assert note == f"longrope's {LENGTH} is written as {length}, which transformers takes for one that is missing"
    assert written(model, "none")[0] is None


@pytest.mark.parametrize(
    "config",
    [
        {**PHI_3, "rope_scaling": LISTS, LENGTH: 4096},
        {**PHI_3, "rope_scaling": {**LISTS, LENGTH: 64}, LENGTH: 64},
        {**PHI_3, "rope_scaling": {**LISTS, LENGTH: 4096}},
        {**PHI_3, "rope_parameters": {**LISTS, "rope_theta": LLAMA["rope_theta"]}, LENGTH: 8192},
        {**PHI_3, "rope_scaling": {**LISTS, "attention_factor": FORMULA}, LENGTH: 4096},
        {**PHI_3, "rope_scaling": {**LISTS, "factor": 8.0}, LENGTH: 4096},
        {**PHI_3, "rope_scaling": {**LISTS, "factor": 3.0, "attention_factor": FORMULA}, LENGTH: 4096},  # the second decides
        {**PHI_3, "rope_scaling": {**LISTS, "factor": 1.0}, LENGTH: 32768},
        {**PHI_MOE, "rope_scaling": {**MOE, LENGTH: 32, "factor": 5.0}},  # its own two factors decide
        {**LLAMA, "rope_scaling": {"type": "longrope"}},  # refused as no class but Phi's reads it
    ],
    ids=str,
)
def test_what_the_class_computes_alike_is_taken(config: dict[str, Any]) -> None:
    assert problems(config) == []


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {**PHI_3, "rope_scaling": {"type": "su", "long_factor": [2.0] * 4}},
            "rope_scaling.short_factor: found long rope without it",
        ),
        (
            {**PHI_3, "rope_scaling": {**LISTS, "long_factor": [2.0] * 3}},
            "rope_scaling.long_factor: found 3 factors; expected a list of 4",
        ),
        ({**PHI_3, "rope_scaling": {**LISTS, "long_factor": [2.0, 0, 1, 1]}}, "rope_scaling.long_factor: found 4 factors"),
        (
            {**PHI_3, "rope_scaling": {**LISTS, LENGTH: 64}},
            f"rope_scaling.{LENGTH}: found 64; expected 4096, which transformers takes",
        ),
        (
            {**PHI_3, "rope_scaling": {**LISTS, LENGTH: 64}, LENGTH: 32},
            f"rope_scaling.{LENGTH}: found 64; expected 32, which the config",
        ),
        ({**PHI_3, "rope_scaling": LISTS, LENGTH: 1}, f"{LENGTH}: found 1; expected a whole number of 2 or more"),
        (
            {**PHI_3, "rope_scaling": {**LISTS, "factor": 4.0}},
            "rope_scaling.factor: found 4.0; expected 1.11803 times what is turned",
        ),
        (
            {**PHI_3, "rope_scaling": {**LISTS, "attention_factor": 1.2}},
            "rope_scaling.attention_factor: found 1.2; expected 1.11803",
        ),
        (
            {**PHI_MOE, "rope_scaling": {**MOE, "long_mscale": None}},
            "rope_scaling.long_mscale: found None; expected a number above 0",
        ),
        ({**PHI_MOE, "rope_scaling": MOE, LENGTH: 32}, f"{LENGTH}: found 32; expected it inside rope_scaling"),
    ],
    ids=str,
)
def test_what_it_would_compute_otherwise_is_refused_by_its_key(config: dict[str, Any], found: str) -> None:
    (problem,) = problems(config)
    assert problem.startswith(f"config.json: {found}")


def test_heads_of_phi_are_their_share_of_the_width() -> None:
    sizes = {"architecture": "Phi3ForCausalLM", "num_attention_heads": 8, "hidden_size": 64}
    assert conflicts({**sizes, "head_size": 8}) == ()
    (conflict,) = conflicts({**sizes, "head_size": 16})
    assert (conflict.key, conflict.found) == ("head_size", "heads of 16")
    assert conflicts({**sizes, "architecture": "LlamaForCausalLM", "head_size": 16}) == ()
