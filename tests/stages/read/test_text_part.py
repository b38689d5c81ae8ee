"""A text model inside a wrapper: what is taken for it, what is left out and said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import convert, plan
from pipeline.errors import BadInput
from pipeline.reporting.verification import verify
from stages.read import find_source
from tests.support import checkpoints, quantized_checkpoints
from tests.support.checkpoints import LLAMA
from tests.support.commands import one, refused
from tests.support.directories import contents

Arrays = dict[str, np.ndarray]
TEXT = {key: value for key, value in LLAMA.items() if key not in ("architectures", "torch_dtype", "tie_word_embeddings")}
EYES = {"vision_tower.layers.0.weight": np.ones((4, 8), np.float16), "some_new_projector.bias": np.ones(8, np.float16)}
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 256}
WIDE_TEXT = {**TEXT, "hidden_size": 256, "intermediate_size": 256}
GPTQ = quantized_checkpoints.gptq()


def wrapped(place: Path, tensors: Arrays, text: dict[str, Any] | None = None, **outer: Any) -> Path:
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float16", **outer}
    checkpoints.save(place, {**config, "text_config": TEXT if text is None else text}, tensors)
    return place


def inside(prefix: str = "language_model.") -> Arrays:
    return {f"{prefix}{name}": values for name, values in checkpoints.values(LLAMA).items()}


def quantized_text(alone: Path) -> Arrays:
    """The tensors of a quantized model as a wrapper has them, with others beside them."""
    stored = load_file(alone / "model.safetensors")
    return {**{f"language_model.{name}": values for name, values in stored.items()}, **EYES}


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


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("inner", [True, False, None], ids=["in the text's entry", "at the top", "with a null in the text's entry"])
def test_a_quantized_text_keeps_its_codes(inner: bool | None, key: str, tmp_path: Path) -> None:
    quantized_checkpoints.write(tmp_path / "alone", WIDE, GPTQ)
    said = {key: GPTQ.settings}
    own = {key: None} if inner is None else said if inner else {}
    model = wrapped(tmp_path / "model", quantized_text(tmp_path / "alone"), {**WIDE_TEXT, **own}, **({} if inner else said))
    assert ranks(model, tmp_path / "a") == ranks(tmp_path / "alone", tmp_path / "b")
    assert "GPTQ" in plan(model_dir=model, output_dir=tmp_path / "c").targets[0].output.config


@pytest.mark.parametrize(
    "name", [r"language_model\.model\.layers", r"model\.language_model\.layers", r"model\.layers"], ids=["file", "memory", "text"]
)
def test_settings_of_single_modules_by_the_checkpoints_own_names(name: str, tmp_path: Path) -> None:
    """Its width decides which zero points are right, and the shapes are held against it."""
    eight = quantized_checkpoints.gptq(bits=8, sym=False)
    kind = quantized_checkpoints.each_its_own({"layers.0.mlp.down_proj": eight, "": GPTQ}, GPTQ.settings)
    expected = quantized_checkpoints.write(tmp_path / "alone", WIDE, kind)
    settings = {**GPTQ.settings, "dynamic": {rf"+:{name}\.0\.mlp\.down_proj": {"bits": 8, "sym": False}}}
    tensors = quantized_text(tmp_path / "alone")
    model = wrapped(tmp_path / "model", tensors, WIDE_TEXT, quantization_config=settings)
    convert(model_dir=model, output_dir=tmp_path / "out", dequantize=True, dtype="float32", scheduler="synchronous")
    found = load_file(tmp_path / "out" / "rank0.safetensors")["transformer.layers.0.mlp.proj.weight"]
    np.testing.assert_array_equal(found, expected["model.layers.0.mlp.down_proj.weight"])
    # All of them in the middle, but for the one that is added: of a symmetric module they would be those of the second version.
    tensors["language_model.model.layers.0.mlp.down_proj.qzeros"].view(np.uint8)[:] = 128
    model = wrapped(tmp_path / "middle", tensors, WIDE_TEXT, quantization_config=settings)
    convert(model_dir=model, output_dir=tmp_path / "again", dequantize=True, dtype="float32", scheduler="synchronous")
    verify(tmp_path / "again", model).check()


def test_names_of_modules_in_the_checkpoint(tmp_path: Path) -> None:
    source = find_source(wrapped(tmp_path / "model", {**inside(), **EYES}), None, None, None, download=False)
    assert source.called["model.layers.0.mlp.down_proj"] == "language_model.model.layers.0.mlp.down_proj"
    assert source.called.keys() == {name.rpartition(".")[0] for name in source.tensors}
    first, *others, last = source.names_of("lm_head")
    assert (first, last) == ("language_model.lm_head", "lm_head")
    assert "model.language_model.lm_head" in others
    checkpoints.write(tmp_path / "alone", LLAMA)
    alone = find_source(tmp_path / "alone", None, None, None, download=False)
    assert (dict(alone.called), list(alone.names_of("lm_head"))) == ({}, ["lm_head"])


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


def test_the_texts_own_type_goes_before_the_wrappers(tmp_path: Path) -> None:
    model = wrapped(tmp_path / "model", inside(), {**TEXT, "torch_dtype": "bfloat16"})
    assert plan(model_dir=model, output_dir=tmp_path / "out").targets[0].dtype == "bfloat16"


def test_a_wrapper_that_nobody_knows_names_its_text(tmp_path: Path) -> None:
    model = wrapped(tmp_path / "model", {**inside(), **EYES}, architectures=["NewForConditionalGeneration"])
    assert "It wraps a text model of the family llama (text_config: llama): save that one alone" in one(refused(model))
