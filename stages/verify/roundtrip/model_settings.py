"""Compare what config.json says of the model itself with the source's own configuration: sizes, experts, multipliers, caps.

The source's is read as transformers reads it, with its classes' values for keys that are missing, and by no table that plans.
Facts: docs/format/checkpoint.md, sections 5 and 6; docs/format/families.md; docs/format/runtime-1.2.md, section f2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.model.computes import model_class
from stages.verify.contract.reader import is_number
from stages.verify.roundtrip.rope_settings import AGAIN, same, scaling_of

Config = Mapping[str, Any]
GRANITE = ("GraniteForCausalLM", "GraniteMoeForCausalLM")
PHI = ("Phi3ForCausalLM", "PhiMoEForCausalLM")
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
# The heads of models whose configuration class in transformers has a size of its own; of others they share the width out.
HEAD_SIZES = {**dict.fromkeys(GEMMA, 256), "Qwen3ForCausalLM": 128, "Qwen3MoeForCausalLM": 128, "SeedOssForCausalLM": 128}
# Two names of what is computed alike: TensorRT-LLM has one GELU, and of experts and of Phi another word for SiLU with a factor.
ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish", "swiglu"), "silu"),
    **dict.fromkeys(("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu"),
}
# The epsilons of norms, where the class in transformers has another than LLaMA's.
EPSILONS = dict.fromkeys(
    (*PHI, "MixtralForCausalLM", "ArcticForCausalLM", "ExaoneForCausalLM", "Qwen2VLForConditionalGeneration"), 1e-5
)
EPSILON = 1e-6
# How the shares of a token's experts are brought to a sum of 1: 1 always, 2 by Phi's mixer, else as `norm_topk_prob` says.
ROUTINGS = {"MixtralForCausalLM": 1, "ArcticForCausalLM": 1, "GraniteMoeForCausalLM": 1, "PhiMoEForCausalLM": 2}
JITTER = 0.01  # transformers' router_jitter_noise
SCALAR, CAP, LOCAL_BASE, PATTERN = 256, 30.0, 10000.0, 6  # Gemma's, where no key says them


def check_model(config: Config, source: Config, options: Config) -> Iterator[Problem]:
    """Report the settings of config.json that are not the source's; those that it lacks, and that have no default, are left to
    others.

    `options`: those of the conversion, which may say what the source does not.
    """
    for key, found, meant in _settings(config, source, options):
        if meant is not None and not same(found, meant):
            yield Problem(f"config.json: {key}", repr(found), f"{meant!r}, by the source", AGAIN)


def _settings(config: Config, source: Config, options: Config) -> Iterator[tuple[str, Any, Any]]:
    """Each setting: its key, its value, and the one that it must have, None where that is not known."""
    architecture = str(config.get("architecture"))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if key in config:
            yield key, config[key], source.get(key)
    if "num_key_value_heads" in config:
        yield (
            "num_key_value_heads",
            config["num_key_value_heads"],
            source.get("num_key_value_heads") or source.get("num_attention_heads"),
        )
    yield from _heads(config, source, architecture)
    if "norm_epsilon" in config:
        said = (source.get(key) for key in ("rms_norm_eps", "layer_norm_epsilon"))
        usual = EPSILONS.get(architecture, EPSILON)
        yield "norm_epsilon", config["norm_epsilon"], next((each for each in said if each is not None), usual)
    if "hidden_act" in config:
        act = source.get("hidden_activation") or source.get("hidden_act") or ("gelu" if architecture in GEMMA else "silu")
        found, meant = (ACTIVATIONS.get(each, each) for each in (str(config["hidden_act"]), str(act)))
        yield "hidden_act", found, meant
    if "max_position_embeddings" in config:
        longest = (
            options.get("max_position_embeddings") or source.get("max_position_embeddings") or source.get("max_sequence_length")
        )
        yield "max_position_embeddings", config["max_position_embeddings"], longest
    own = model_class(config)
    if own and own.name == "llama" and config.get("num_attention_heads"):
        yield from _multipliers(config, source, architecture in GRANITE)
    if architecture in GEMMA:
        yield from _gemma(config, source, architecture)
    if isinstance(config.get("moe"), Mapping) and config["moe"].get("num_experts"):
        yield from _experts(config["moe"], source, architecture)


def _heads(config: Config, source: Config, architecture: str) -> Iterator[tuple[str, Any, Any]]:
    hidden, heads = (_number(source.get(key)) for key in ("hidden_size", "num_attention_heads"))
    if not hidden or not heads or "num_attention_heads" not in config:
        return
    names = (architecture, *(source.get("architectures") or ()))
    own = next((HEAD_SIZES[name] for name in names if name in HEAD_SIZES), hidden // heads)
    size = _number(source.get("kv_channels")) or _number(source.get("head_dim")) or own
    found = config.get("head_size") or config.get("hidden_size", hidden) // config["num_attention_heads"]
    yield "head_size", found, size
    share = 1.0
    if architecture in PHI:
        said = (_number(each.get("partial_rotary_factor")) for each in (scaling_of(source), source))
        share = next(filter(None, said), 1.0)
        yield "rotary_pct", config.get("rotary_pct", 1.0), share
    turned = config.get("rotary_embedding_dim")
    yield (
        "rotary_embedding_dim",
        int(found * (_number(config.get("rotary_pct")) or 1.0)) if turned is None else turned,
        int(size * share),
    )


def _multipliers(config: Config, source: Config, granite: bool) -> Iterator[tuple[str, Any, Any]]:
    """Granite's, which the LLaMA class computes for all; scores are divided by the root of a head's size beside."""
    size = config.get("head_size") or config.get("hidden_size", 0) // config["num_attention_heads"]
    said = (source.get(key) for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"))
    embedding, attention, residual, logits = (1.0 if each is None or not granite else _number(each) or 0.0 for each in said)
    yield "embedding_multiplier", config.get("embedding_multiplier", 1.0), embedding
    yield "attention_multiplier", config.get("attention_multiplier", 1.0), attention * math.sqrt(size) if granite else 1.0
    yield "residual_multiplier", config.get("residual_multiplier", 1.0), residual
    yield "output_multiplier_scale", config.get("output_multiplier_scale", 1.0), 1 / logits if logits else None


def _gemma(config: Config, source: Config, architecture: str) -> Iterator[tuple[str, Any, Any]]:
    second, third = (architecture == f"Gemma{n}ForCausalLM" for n in (2, 3))
    if second or third:
        yield "query_pre_attn_scalar", config.get("query_pre_attn_scalar"), source.get("query_pre_attn_scalar", SCALAR)
    capped = source.get("final_logit_softcapping", CAP if second else None)
    yield "final_logit_softcapping", config.get("final_logit_softcapping") or 0, capped or 0
    if second:
        found = config.get("attn_logit_softcapping") or 0
        yield "attn_logit_softcapping", found, source.get("attn_logit_softcapping", 50.0) or 0
    if third:
        parameters = source.get("rope_parameters")
        local = parameters.get("sliding_attention") if isinstance(parameters, Mapping) else None
        told = local.get("rope_theta") if isinstance(local, Mapping) else None
        base = told or source.get("rope_local_base_freq") or LOCAL_BASE
        yield "rope_local_base_freq", config.get("rope_local_base_freq"), base
        pattern = source.get("sliding_window_pattern") or source.get("_sliding_window_pattern")
        pattern = pattern or (None if source.get("layer_types") else PATTERN)
        yield "_sliding_window_pattern", config.get("_sliding_window_pattern"), pattern


def _experts(moe: Config, source: Config, architecture: str) -> Iterator[tuple[str, Any, Any]]:
    keys = ("num_experts", "num_local_experts") if architecture.startswith("Qwen") else ("num_local_experts", "num_experts")
    count = next((source[key] for key in keys if source.get(key) is not None), None)
    yield "moe.num_experts", moe.get("num_experts"), count
    yield "moe.top_k", moe.get("top_k"), source.get("num_experts_per_tok")
    mode = ROUTINGS.get(architecture, int(bool(source.get("norm_topk_prob"))))
    yield "moe.normalization_mode", moe.get("normalization_mode") or 0, mode
    if mode == 2:
        yield "moe.sparse_mixer_epsilon", moe.get("sparse_mixer_epsilon"), source.get("router_jitter_noise", JITTER)


def _number(value: Any) -> Any:
    """The value where it is a number, else None."""
    return value if is_number(value) else None
