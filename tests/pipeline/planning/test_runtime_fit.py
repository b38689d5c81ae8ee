"""Walk over the runtime table: every class by every quantization, kind of rope and split is converted and verified, or refused with
the reason. Nothing falls through.

What is expected is said here in words of its own, after docs/format/runtime-1.2.md.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import convert, plan
from pipeline.errors import BadInput
from pipeline.model.computes import conflicts
from pipeline.model.runtime import runtime
from pipeline.reporting.verification import verify
from tests.end_to_end.test_family_forward import build
from tests.pipeline.reporting.test_verify_families import FAMILIES, sized
from tests.support.own_names import exaone, internlm2

MIXTURES = (
    "MixtralForCausalLM",
    "ArcticForCausalLM",
    "GraniteMoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "PhiMoEForCausalLM",
)
PHI = ("Phi3ForCausalLM", "PhiMoEForCausalLM")
AXES = "Qwen2VLForConditionalGeneration"  # whose positions have several
BUILT = {
    "LlamaForCausalLM": "llama_biases",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "GraniteForCausalLM": "granite",
    "ExaoneForCausalLM": "mistral",
    "InternLM2ForCausalLM": "mistral",
    "InternLMForCausalLM": "llama_biases",
    "SkyworkForCausalLM": "mistral",
    "GraniteMoeForCausalLM": "granitemoe",
    "ArcticForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2VLForConditionalGeneration": "qwen2",
    "Qwen2ForSequenceClassification": "qwen2",
    "Phi3ForCausalLM": "phi3",
    "PhiMoEForCausalLM": "phimoe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FACTORS = {"short_factor": [1.0 + n / 20 for n in range(32)], "long_factor": [1.0 + n for n in range(32)]}
YARN = {"rope_type": "yarn", "factor": 4.0}
ROPES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "empty": {},
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 2.0},
    "llama3": LLAMA3,
    "llama3 without a length": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
    "llama3 without bands": {"rope_type": "llama3", "factor": 8.0},
    "yarn": YARN,
    "yarn with another factor": {**YARN, "attention_factor": 3.0},
    "yarn without truncation": {**YARN, "truncate": False},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "dynamic with alpha": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0},
    "longrope": {"type": "longrope", **FACTORS, "short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": 64},
    "mrope": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "unknown": {"rope_type": "cosine", "factor": 2.0},
}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"use_weight_only": True},
    "int4": {"use_weight_only": True, "weight_only_precision": "int4"},
    "fp8 by row": {"use_fp8_rowwise": True},
}
STAGES = (1, 2)


def reasons(architecture: str, quantization: str, rope: str, stages: int) -> set[str]:
    """Parts of what a plan must say; empty where it must accept."""
    result = set()
    unscaled = architecture in (*PHI, "Gemma3ForCausalLM")
    if stages > 1 and architecture in PHI:
        result.add("sends nothing from stage to stage")
    if rope == "llama3 without bands":
        return {"rope_scaling.low_freq_factor: found llama3 without it", "rope_scaling.high_freq_factor: found llama3 without it"}
    if rope == "unknown" or (rope == "longrope" and architecture not in PHI):
        result.add("class computes no other")
    elif architecture == AXES and rope != "mrope":
        result.add("mrope_section" if rope in ("none", "empty", "default") else "as position_embedding")
    elif architecture == AXES:
        pass
    elif rope == "mrope":
        result.add("as position_embedding" if architecture.startswith("Qwen") else "class computes no other")
    elif rope not in ("none", "empty", "default", "longrope") and unscaled:
        result.add("null: " + architecture)
    elif rope == "dynamic":
        result.add("asserts alpha")
    elif rope == "yarn with another factor":
        result.add("as TensorRT-LLM has it, not 3")
    elif rope == "yarn without truncation":
        result.add("truncate: found false")
    if quantization == "fp8 by row":
        if architecture in MIXTURES:
            result.add("a model without experts")
        if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM") or (architecture in PHI and rope == "longrope"):
            result.add("Fp8RowwiseAttention computes none of these")
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each architecture in bfloat16, made when it is first asked for."""

    class Models(dict[str, Path]):
        def __missing__(self, architecture: str) -> Path:
            directory = tmp_path_factory.mktemp(architecture)
            build(sized(BUILT[architecture])).to(torch.bfloat16).save_pretrained(directory)
            config = json.loads((directory / "config.json").read_text())
            config = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling", "layer_types")}
            config |= {"rope_theta": 10000.0, "architectures": [architecture], "sliding_window": None}
            if architecture == "Qwen2ForSequenceClassification":
                tensors = load_file(directory / "model.safetensors")
                tensors["score.weight"] = tensors.pop("lm_head.weight")[:4].clone()
                save_file(tensors, directory / "model.safetensors")
            if architecture == "ArcticForCausalLM":
                config |= {"parallel_attn_mlp_res": True, "moe_layer_frequency": 1}
                save_file(beside_experts(directory / "model.safetensors"), directory / "model.safetensors")
            if other := {"ExaoneForCausalLM": exaone, "InternLM2ForCausalLM": internlm2}.get(architecture):
                arrays = load_file(directory / "model.safetensors")
                config, tensors = other(config, {name: values.view(torch.int16).numpy() for name, values in arrays.items()})
                renamed = {name: torch.from_numpy(values.copy()).view(torch.bfloat16) for name, values in tensors.items()}
                save_file(renamed, directory / "model.safetensors")
            (directory / "config.json").write_text(json.dumps(config))
            self[architecture] = directory
            return directory

    return Models()


def beside_experts(model: Path) -> dict[str, torch.Tensor]:
    """Mixtral's tensors and those of Arctic's dense MLPs."""
    tensors = load_file(model)
    for name in [name for name in tensors if name.endswith(".self_attn.o_proj.weight")]:
        layer, size = name.partition(".self_attn.")[0], tensors[name].shape[0]
        tensors |= {f"{layer}.residual_mlp.w{n}.weight": torch.full((size, size), 0.01 * n).bfloat16() for n in (1, 2, 3)}
        tensors[f"{layer}.residual_layernorm.weight"] = torch.ones(size).bfloat16()
    return tensors


def with_rope(model: Path, rope: str, place: Path) -> Path:
    place.mkdir()
    os.link(model / "model.safetensors", place / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    if rope == "longrope":  # transformers takes Phi-3's from here
        config["original_max_position_embeddings"] = ROPES[rope]["original_max_position_embeddings"]
    (place / "config.json").write_text(json.dumps({**config, "rope_scaling": ROPES[rope]}))
    return place


def test_the_walk_is_over_the_whole_table() -> None:
    assert BUILT.keys() == runtime().classes.keys()
    assert set(BUILT.values()) <= set(FAMILIES)
    kinds = {kind for each in runtime().classes.values() for kind in each.rope}
    assert kinds <= {str((rope or {}).get("type", (rope or {}).get("rope_type"))) for rope in ROPES.values()}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", BUILT)
def test_every_combination_is_accepted_or_refused_with_the_reason(
    architecture: str, rope: str, models: dict[str, Path], tmp_path: Path
) -> None:
    model = with_rope(models[architecture], rope, tmp_path / "model")
    for quantization, stages in itertools.product(QUANTIZATIONS, STAGES):
        expected = reasons(architecture, quantization, rope, stages)
        options = {"model_dir": model, "output_dir": tmp_path / "ranks", "pp_size": stages, **QUANTIZATIONS[quantization]}
        if not expected:
            config = json.loads(plan(**options).targets[0].output.config)
            assert conflicts(config) == ()
            continue
        with pytest.raises(BadInput) as error:
            plan(**options)
        said = [str(problem) for problem in error.value.problems]
        assert all(any(reason in each for each in said) for reason in expected), (quantization, stages, said)
        assert all(any(reason in each for reason in expected) for each in said), (quantization, stages, said)
        assert all(problem.remedy for problem in error.value.problems), said


def test_heads_of_another_size_than_phi_s_class_has_are_refused(tmp_path: Path) -> None:
    case = sized("phi3")
    build(replace(case, options={**case.options, "head_dim": 32})).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput) as error:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "ranks")
    (problem,) = error.value.problems
    assert problem.subject == f"{tmp_path / 'model/config.json'}: head_dim"
    assert problem.expected.startswith("hidden_size / num_attention_heads")


# Each class is tried in every quantization and, by day, these in every kind of rope.
WALKED = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM")
ACCEPTED = [
    pytest.param(
        *each,
        marks=()
        if each[3] == 1 and (each[2] == "none" or (each[1] == "none" and each[0] in WALKED and each[2] != "empty"))
        else pytest.mark.nightly,
    )
    for each in itertools.product(BUILT, QUANTIZATIONS, ROPES, STAGES)
    if not reasons(*each)
]


@pytest.mark.parametrize(("architecture", "quantization", "rope", "stages"), ACCEPTED)
def test_what_is_accepted_is_verified(
    architecture: str, quantization: str, rope: str, stages: int, models: dict[str, Path], tmp_path: Path
) -> None:
    model = with_rope(models[architecture], rope, tmp_path / "model")
    options = {**QUANTIZATIONS[quantization], "pp_size": stages}
    convert(model_dir=model, output_dir=tmp_path / "ranks", scheduler="synchronous", **options)
    verify(tmp_path / "ranks", model).check()
