"""Converted ranks compute what the family computes: logits from the rank files against transformers' own, in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from pipeline import convert
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.transformers_model import set_head_epsilon
from tests.support.directories import contents

# Tiny; the vocabulary is odd, so that it is padded, and the epsilon great enough to be seen.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTH = 20
TOLERANCE = 1e-5  # of the greatest logit: float32 sums in another order


@dataclass(frozen=True)
class Case:
    """A family's model, by its configuration."""

    config: type
    model: type
    options: Mapping[str, Any] = field(default_factory=dict)


GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 5.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + n / 20 for n in range(8)],
    "long_factor": [1.0 + n for n in range(8)],
}
LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 16}
# Half of each head is turned: as many factors as there are periods.
PARTIAL = {**LONG_ROPE, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
MSCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
# Caps and scales that matter for logits of this size.
GEMMA = {"head_dim": 24, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_2 = {**GEMMA, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
# The first layer is local, the second full.
GEMMA_3 = {**GEMMA, "query_pre_attn_scalar": 40, "sliding_window_pattern": 2, "sliding_window": 7}

CASES = {
    "llama": Case(LlamaConfig, LlamaForCausalLM),
    "llama_biases": Case(LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "num_hidden_layers": 3}),
    "llama_linear": Case(
        LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}
    ),
    "mistral": Case(MistralConfig, MistralForCausalLM, {"head_dim": 24, "sliding_window": None}),
    "mistral_window": Case(MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "qwen2_window": Case(Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "phi3_window": Case(Phi3Config, Phi3ForCausalLM, {"sliding_window": 7}),
    "gemma2_window": Case(Gemma2Config, Gemma2ForCausalLM, {**GEMMA_2, "sliding_window": 7, "num_hidden_layers": 3}),
    "mixtral": Case(MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": Case(GraniteConfig, GraniteForCausalLM, GRANITE),
    "granite_tied": Case(GraniteConfig, GraniteForCausalLM, {**GRANITE, "tie_word_embeddings": True}),
    "granitemoe": Case(
        GraniteMoeConfig,
        GraniteMoeForCausalLM,
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3},
    ),
    "ernie4_5": Case(Ernie4_5Config, Ernie4_5ForCausalLM, {"head_dim": 24, "use_bias": False, "num_hidden_layers": 3}),
    "ernie4_5_biases": Case(Ernie4_5Config, Ernie4_5ForCausalLM, {"head_dim": 24, "use_bias": True, "tie_word_embeddings": True}),
    "helium": Case(HeliumConfig, HeliumForCausalLM, {"head_dim": 16, "num_hidden_layers": 3}),
    "seed_oss": Case(SeedOssConfig, SeedOssForCausalLM, {"head_dim": 24, "attention_out_bias": False, "num_hidden_layers": 3}),
    "qwen2": Case(Qwen2Config, Qwen2ForCausalLM),
    "qwen2_tied": Case(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2_moe": Case(Qwen2MoeConfig, Qwen2MoeForCausalLM, {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3": Case(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "qwen3_tied": Case(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_moe": Case(Qwen3MoeConfig, Qwen3MoeForCausalLM, {**EXPERTS, "num_experts": 4, "head_dim": 24}),
    "phi3": Case(Phi3Config, Phi3ForCausalLM),
    "phi3_long": Case(Phi3Config, Phi3ForCausalLM, {**LONG, "rope_parameters": {**LONG_ROPE}}),
    "phi3_partial": Case(Phi3Config, Phi3ForCausalLM, {**LONG, "rope_parameters": {**PARTIAL}, "tie_word_embeddings": True}),
    "phimoe": Case(
        PhimoeConfig,
        PhimoeForCausalLM,
        {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.2},
    ),
    "phimoe_long": Case(
        PhimoeConfig,
        PhimoeForCausalLM,
        {
            "num_local_experts": 4,
            "attention_bias": True,
            "lm_head_bias": True,
            "max_position_embeddings": 256,
            "rope_parameters": {**LONG_ROPE, **MSCALES, "original_max_position_embeddings": 64},
        },
    ),
    "gemma": Case(GemmaConfig, GemmaForCausalLM, {"head_dim": 24}),
    "gemma_one_kv": Case(GemmaConfig, GemmaForCausalLM, {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": Case(Gemma2Config, Gemma2ForCausalLM, GEMMA_2),
    "gemma2_one_kv": Case(Gemma2Config, Gemma2ForCausalLM, {**GEMMA_2, "num_key_value_heads": 1}),
    "gemma3": Case(Gemma3TextConfig, Gemma3ForCausalLM, GEMMA_3),
    "gemma3_one_kv": Case(Gemma3TextConfig, Gemma3ForCausalLM, {**GEMMA_3, "num_key_value_heads": 1}),
}
# Where NVIDIA's own converter describes another model than the source is.
CONTRADICTED = {
    "granite_one": Case(GraniteConfig, GraniteForCausalLM, {**GRANITE, "attention_multiplier": 1.0}),
    "qwen2_moe_normalized": replace(CASES["qwen2_moe"], options={**CASES["qwen2_moe"].options, "norm_topk_prob": True}),
    "qwen3_moe_normalized": replace(CASES["qwen3_moe"], options={**CASES["qwen3_moe"].options, "norm_topk_prob": True}),
}
TARGETS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp_size": 2},
    "tp4": {"tp_size": 4},  # more ranks than kv heads
    "pp2": {"pp_size": 2},
    "tp2pp2": {"tp_size": 2, "pp_size": 2},
    "tp4pp2": {"tp_size": 4, "pp_size": 2},
    "ep2": {"tp_size": 2, "moe_tp_size": 1, "moe_ep_size": 2},
    "tp4ep2": {"tp_size": 4, "moe_tp_size": 2, "moe_ep_size": 2},
    "rows": {"tp_size": 2, "use_parallel_embedding": True},
    "columns": {"tp_size": 2, "use_parallel_embedding": True, "embedding_sharding_dim": 1},
}
WANTED = {
    "llama": ["tp1", "tp4pp2", "rows", "columns"],
    "llama_biases": ["tp4", "pp2"],
    "llama_linear": ["tp2"],
    "mistral": ["tp2"],
    "mistral_window": ["tp2", "pp2"],
    "qwen2_window": ["tp1", "pp2"],
    "phi3_window": ["tp2"],
    "gemma2_window": ["tp1", "pp2"],
    "mixtral": ["tp4", "ep2", "tp4ep2", "pp2"],
    "granite": ["tp2", "pp2"],
    "granite_tied": ["tp2", "pp2"],
    "granitemoe": ["tp4", "ep2", "tp2pp2"],
    "ernie4_5": ["tp4", "tp2pp2"],
    "ernie4_5_biases": ["tp1", "tp2pp2"],
    "helium": ["tp4", "tp2pp2"],
    "seed_oss": ["tp4", "tp2pp2", "rows"],
    "qwen2": ["tp4", "pp2"],
    "qwen2_tied": ["tp2", "pp2"],
    "qwen2_moe": ["tp1", "tp2", "ep2", "tp4ep2", "pp2"],
    "qwen3": ["tp4", "pp2"],
    "qwen3_tied": ["tp2", "tp2pp2"],
    "qwen3_moe": ["tp2", "ep2", "tp4ep2", "pp2"],
    "phi3": ["tp1", "tp2", "tp4"],
    "phi3_long": ["tp1", "tp4"],
    "phi3_partial": ["tp2", "tp4"],
    "phimoe": ["tp1", "tp2", "tp4", "ep2"],
    "phimoe_long": ["tp2", "tp4ep2"],
    "gemma": ["tp1", "tp4", "pp2"],
    "gemma_one_kv": ["tp4"],
    "gemma2": ["tp1", "tp4", "pp2"],
    "gemma2_one_kv": ["tp2pp2"],
    "gemma3": ["tp1", "tp4", "pp2"],
    "gemma3_one_kv": ["tp4pp2"],
}


def build(case: Case) -> PreTrainedModel:
    """A seeded model whose every parameter matters: attention that is not flat, norms and biases that are not constant."""
    model = case.model(case.config(**{**SIZES, **case.options}, attn_implementation="eager")).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values if "embed" in name else values * 2 / parameter.shape[-1] ** 0.5)
            else:
                # Gemma's norms and all biases lie around 0, the other norms around 1, where they begin.
                parameter.add_(values * 0.3)
    set_head_epsilon(model, 1e-5)  # the class of TensorRT-LLM's, whatever the configuration says
    return model


@dataclass(frozen=True)
class Built:
    """A model, where it is saved, and its logits for prompts of two lengths."""

    model: PreTrainedModel
    directory: Path
    prompts: tuple[tuple[Tensor, Tensor], ...]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Built]:
    """Models, each made when it is first asked for."""

    class Models(dict[str, Built]):
        def __missing__(self, name: str) -> Built:
            directory = tmp_path_factory.mktemp(name) / "model"
            model = build({**CASES, **CONTRADICTED}[name])
            model.save_pretrained(directory)
            generator = torch.Generator().manual_seed(2)
            prompts = []
            for length in (LENGTH, 11):
                tokens = torch.randint(SIZES["vocab_size"], (length,), generator=generator)
                with torch.no_grad():
                    prompts.append((tokens, model(tokens[None]).logits[0]))
            self[name] = Built(model, directory, tuple(prompts))
            return self[name]

    return Models()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The greatest, relative to the greatest logit."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits(output: Path, tokens: Tensor) -> Tensor:
    """What the ranks compute, with every tensor that they hold."""
    decoder = Decoder(open_checkpoint(output))
    result = decoder.logits(tokens)
    assert decoder.unused() == []
    return result


def ranks_of(model: Path, output: Path, target: str, **options: Any) -> Path:
    convert(model_dir=model, output_dir=output, dtype="float32", scheduler="synchronous", **TARGETS[target], **options)
    return output


@pytest.mark.parametrize(("name", "target"), [(name, target) for name, targets in WANTED.items() for target in targets])
def test_the_ranks_compute_what_the_model_computes(name: str, target: str, built: Mapping[str, Built], tmp_path: Path) -> None:
    output = ranks_of(built[name].directory, tmp_path / "ranks", target)
    for tokens, theirs in built[name].prompts:
        assert difference(logits(output, tokens), theirs) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_memory_gives_the_same_ranks(name: str, built: Mapping[str, Built], tmp_path: Path) -> None:
    """transformers 5 holds experts in one stack and saves them one by one."""
    target = "ep2" if name == "mixtral" or "moe" in name else "tp2"
    options = {"dtype": "float32", "scheduler": "synchronous", **TARGETS[target]}
    convert(model=built[name].model, output_dir=tmp_path / "memory", **options)
    assert contents(tmp_path / "memory") == contents(ranks_of(built[name].directory, tmp_path / "saved", target))


# How older checkpoints write what transformers 5 keeps in `rope_parameters`.
@pytest.mark.parametrize("name", CASES)
def test_both_styles_of_configuration_give_the_same_ranks(name: str, built: Mapping[str, Built], tmp_path: Path) -> None:
    new = built[name].directory
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.safetensors").hardlink_to(new / "model.safetensors")
    (old / "config.json").write_text(json.dumps(old_style(json.loads((new / "config.json").read_text()))))
    assert contents(ranks_of(old, tmp_path / "a", "tp2")) == contents(ranks_of(new, tmp_path / "b", "tp2"))


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        parameters = parameters["full_attention"]
    config["rope_theta"] = parameters.pop("rope_theta")
    partial = parameters.pop("partial_rotary_factor", 1.0)
    if partial != 1:
        config["partial_rotary_factor"] = partial
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    if config["model_type"] == "phi3" and config["rope_scaling"]:
        # Phi-3's files say `type`, and the trained length beside it.
        scaling = config["rope_scaling"]
        config["rope_scaling"] = {"type": scaling["rope_type"], **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    return config


# What NVIDIA's converter gets wrong, or what its 1.2.1 asks for and earlier versions did not.


@pytest.mark.parametrize("name", CONTRADICTED)
def test_what_the_model_says_counts(name: str, built: Mapping[str, Built], tmp_path: Path) -> None:
    """Shares of experts that sum to one, and Granite's multiplier of scores in the place of TensorRT-LLM's, also where it is 1."""
    output = ranks_of(built[name].directory, tmp_path / "ranks", "tp2" if name == "granite_one" else "ep2")
    tokens, theirs = built[name].prompts[0]
    assert difference(logits(output, tokens), theirs) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("phi")])
def test_phi_says_how_much_of_a_head_is_turned(name: str, built: Mapping[str, Built], tmp_path: Path) -> None:
    """TensorRT-LLM's Phi3DecoderLayer reads `rotary_pct` without a default."""
    directory = tmp_path / "old"
    directory.mkdir()
    (directory / "model.safetensors").hardlink_to(built[name].directory / "model.safetensors")
    config = old_style(json.loads((built[name].directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(config))
    written = json.loads((ranks_of(directory, tmp_path / "ranks", "tp1") / "config.json").read_text())
    assert written["rotary_pct"] == config.get("partial_rotary_factor", 1.0)
    assert written["rotary_embedding_dim"] == written["head_size"] * written["rotary_pct"]


# InternLM2 and Exaone: a LLaMA model under their names
