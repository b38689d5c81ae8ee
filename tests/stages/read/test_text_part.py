"""A text model inside a wrapper: what is taken for it, what is left out and said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import convert, plan
from pipeline.errors import BadInput
from tests.support import checkpoints, quantized_checkpoints
from tests.support.checkpoints import LLAMA
from tests.support.commands import one, refused
from tests.support.directories import contents

Arrays = dict[str, np.ndarray]
TEXT = {key: value for key, value in LLAMA.items() if key not in ("architectures", "torch_dtype", "tie_word_embeddings")}
EYES = {"vision_tower.layers.0.weight": np.ones((4, 8), np.float16), "some_new_projector.bias": np.ones(8, np.float16)}


def wrapped(place: Path, tensors: Arrays, text: dict[str, Any] | None = None, **outer: Any) -> Path:
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float16", **outer}
    checkpoints.save(place, {**config, "text_config": TEXT if text is None else text}, tensors)
    return place


def inside(prefix: str = "language_model.") -> Arrays:
    return {f"{prefix}{name}": values for name, values in checkpoints.values(LLAMA).items()}


def ranks(model: Path, output: Path) -> dict[str, bytes]:
    convert(model_dir=model, output_dir=output, tp_size=2, scheduler="synchronous")
    return contents(output)


def notes(model: Path) -> str:
    return "\n".join(plan(model_dir=model, output_dir=model.parent / "other").notes)


@pytest.mark.parametrize("names", ["old", "new"])
def test_the_text_alone_has_the_same_ranks(names: str, tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "alone", LLAMA)
    tensors = inside()
    if names == "new":
        heads = {name: name.removeprefix("language_model.").replace("model.", "model.language_model.", 1) for name in tensors}
        tensors = {heads[name]: values for name, values in tensors.items()}
    model = wrapped(tmp_path / "model", {**tensors, **EYES}, tie_word_embeddings=False)
    assert ranks(model, tmp_path / "a") == ranks(tmp_path / "alone", tmp_path / "b")
    told = notes(model)
    assert "text of LlavaForConditionalGeneration: text_config is read as LlamaForCausalLM's; left out are " in told
    assert "some_new_projector (1 tensor, 16 bytes), vision_tower (1 tensor, 64 bytes)" in told


@pytest.mark.parametrize("inner", [True, False], ids=["in the text's entry", "at the top"])
def test_a_quantized_text_keeps_its_codes(inner: bool, tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 256}
    kind = quantized_checkpoints.gptq()
    quantized_checkpoints.write(tmp_path / "alone", config, kind)
    stored = load_file(tmp_path / "alone" / "model.safetensors")
    tensors = {f"language_model.{name}": values for name, values in stored.items()}
    text = {**TEXT, "hidden_size": 256, "intermediate_size": 256}
    settings = {"quantization_config": kind.settings}
    model = wrapped(tmp_path / "model", {**tensors, **EYES}, {**text, **(settings if inner else {})}, **({} if inner else settings))
    assert ranks(model, tmp_path / "a") == ranks(tmp_path / "alone", tmp_path / "b")
    assert "GPTQ" in plan(model_dir=model, output_dir=tmp_path / "c").targets[0].output.config


def test_a_tensor_inside_the_text_that_has_no_place_there_is_refused(tmp_path: Path) -> None:
    tensors = {**inside(), **EYES, "language_model.model.layers.1.cross_attn.q_proj.weight": np.ones((4, 4), np.float16)}
    problem = one(refused(wrapped(tmp_path / "model", tensors)))
    assert problem.startswith("language_model.model.layers.1.cross_attn.q_proj.weight: found a tensor that belongs nowhere")


def test_an_adapter_of_the_text_is_not_left_out(tmp_path: Path) -> None:
    name = "language_model.model.layers.0.self_attn.q_proj"
    tensors = {**inside(), f"{name}.lora_A.default.weight": np.ones((4, 64), np.float16)}
    assert "LoRA modules of PEFT that are not merged" in one(refused(wrapped(tmp_path / "model", tensors)))


@pytest.mark.parametrize("head", [True, False])
def test_keys_that_contradict_one_another_about_ties_leave_it_to_the_tensors(head: bool, tmp_path: Path) -> None:
    tensors = inside()
    if not head:
        del tensors["language_model.lm_head.weight"]
    model = wrapped(tmp_path / "model", tensors, {**TEXT, "tie_word_embeddings": head}, tie_word_embeddings=not head)
    made = plan(model_dir=model, output_dir=tmp_path / "out")
    assert made.model.tie_word_embeddings is not head


def test_sizes_that_the_entry_lacks_are_transformers_own_and_said(tmp_path: Path) -> None:
    rest = {key: value for key, value in TEXT.items() if key not in ("hidden_size", "vocab_size")}
    with pytest.raises(BadInput) as error:  # of LLaMA 7B, which these tensors are not
        plan(model_dir=wrapped(tmp_path / "model", inside(), rest), output_dir=tmp_path / "out")
    assert any("expected [32000, 4096] by the model's configuration" in str(problem) for problem in error.value.problems)


def test_a_text_of_granite_that_has_as_many_heads_as_its_class(tmp_path: Path) -> None:
    text = {**TEXT, "model_type": "granite", "hidden_size": 256, "num_attention_heads": 32}
    tensors = {f"language_model.{name}": values for name, values in checkpoints.values({**LLAMA, **text}).items()}
    del text["num_attention_heads"]
    model = wrapped(tmp_path / "model", tensors, text, architectures=["LlavaNextForConditionalGeneration"])
    assert "text_config of config.json lacks what transformers' default is: vocab_size" not in notes(model)
    assert "lacks what transformers' default is: num_attention_heads 32" in notes(model)


def test_the_texts_own_type_goes_before_the_wrappers(tmp_path: Path) -> None:
    model = wrapped(tmp_path / "model", inside(), {**TEXT, "torch_dtype": "bfloat16"})
    assert plan(model_dir=model, output_dir=tmp_path / "out").targets[0].dtype == "bfloat16"


def test_a_wrapper_that_nobody_knows_names_its_text(tmp_path: Path) -> None:
    model = wrapped(tmp_path / "model", {**inside(), **EYES}, architectures=["NewForConditionalGeneration"])
    assert "It wraps a text model of the family llama (text_config: llama): save that one alone" in one(refused(model))
