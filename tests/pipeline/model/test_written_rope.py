"""What is written of a model's rope scaling, where the source leaves some of it out."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import Family, find_family
from pipeline.model.written_rope import RopeScaling, overlooked_notes, undeclared, written_scaling
from tests.support.checkpoints import LLAMA
from tests.support.meta_files import params

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}
LENGTH = "original_max_position_embeddings"


def read(container: str, scaling: Any) -> tuple[ModelConfig, Family]:
    family = find_family(container, "LlamaForCausalLM")
    assert family is not None
    sizes = LLAMA if container == "huggingface" else {"hidden_dim": 160, **params(LLAMA)}
    return model_config({**sizes, "rope_scaling": scaling}, family, "LlamaForCausalLM", "config.json"), family


@pytest.mark.parametrize(("scaling", "taken"), [(LLAMA3, 8192), (YARN, 4096)], ids=["llama3", "yarn"])
def test_an_original_length_is_the_models_own(scaling: dict[str, Any], taken: int) -> None:
    model, family = read("huggingface", scaling)
    written, note = written_scaling(model, family, "auto")
    assert written == {**scaling, LENGTH: 128}
    assert note.endswith(f"is written as 128, the model's own: TensorRT-LLM would take {taken}")
    written, note = written_scaling(model, family, "keep")
    assert written == scaling
    assert f"takes {taken} and the model 128" in note


@pytest.mark.parametrize("mode", ["auto", "keep"])
@pytest.mark.parametrize("container", ["huggingface", "meta"])
def test_a_length_that_is_there_stays(container: str, mode: RopeScaling) -> None:
    model, family = read(container, {**LLAMA3, LENGTH: 32})
    assert written_scaling(model, family, mode) == ({**LLAMA3, LENGTH: 32}, "")
    assert undeclared(model, family, "config.json") == []


def test_a_factor_that_other_programs_read_is_spoken_of() -> None:
    """As in DeepSeek-R1-0528-Qwen3-8B: transformers, which the model is compared with, does not read it."""
    model, family = read("huggingface", {**YARN, LENGTH: 32, "attn_factor": 0.8782488562869419})
    assert written_scaling(model, family, "auto") == (model.rotary_scaling, "")
    (note,) = overlooked_notes(model)
    assert note.startswith("rope_scaling.attn_factor 0.8782488562869419 changes nothing in an engine, as in transformers: vLLM")
    assert overlooked_notes(read("huggingface", {**YARN, "attn_factor": 1.0})[0]) == []
    assert overlooked_notes(read("huggingface", {**LLAMA3, "attn_factor": 0.5})[0]) == []


def test_metas_means_the_values_of_the_class() -> None:
    model, family = read("meta", {"type": "llama3"})
    assert written_scaling(model, family, "auto") == ({"type": "llama3"}, "")
    assert undeclared(model, family, "params.json") == []


def test_a_hugging_face_model_declares_its_bands() -> None:
    model, family = read("huggingface", {"rope_type": "llama3", "factor": None})
    problems = undeclared(model, family, "config.json")
    assert [problem.subject for problem in problems] == [f"config.json: rope_scaling.{key}" for key in list(LLAMA3)[1:]]
    assert all("TensorRT-LLM that of Llama 3.1" in problem.expected for problem in problems)
