"""The configuration of a source's model, as transformers would read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import Source
from stages.verify.roundtrip.original.as_known import AS_KNOWN
from stages.verify.roundtrip.original.gguf import gguf_config

# Keys that do not describe the model: a quantizer's, and where remote code is.
NOT_THE_MODELS = ("quantization_config", "compression_config", "auto_map")
EXAONE = {"num_layers": "num_hidden_layers", "activation_function": "hidden_act", "layer_norm_epsilon": "rms_norm_eps"}
META = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
    "head_dim": "head_dim",
    "sliding_window": "sliding_window",
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}  # Mistral's own files are as Meta's
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# The defaults of Meta's code and of LLaMA itself.
DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}
# The scaling of Meta's code for `use_scaled_rope`; params.json may name another factor. Llama 3.2's is 32, by width and layers.
LLAMA3_2 = {(2048, 16), (3072, 28)}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def canonical_config(source: Source) -> dict[str, Any]:
    """The config.json by which transformers runs a source's weights under Hugging Face's names.

    Meta's, InternLM2's and Exaone's become LLaMA's or Mixtral's, GGUF's those of gguf.py, and those of models without a class of
    their own (as_known.py) another's; others stay as they are. Raises BadInput naming the sizes of the model that a GGUF file or
    Meta's params.json lacks.
    """
    values = {key: value for key, value in source.config.items() if key not in NOT_THE_MODELS}
    if source.container == "meta":
        config = _translated(source, values, META)
        if values.get("use_scaled_rope"):
            usual = 32.0 if (config["hidden_size"], config["num_hidden_layers"]) in LLAMA3_2 else 8.0
            config["rope_scaling"] = {**LLAMA3_SCALING, "factor": float(values.get("rope_scaling_factor") or usual)}
        llama = _llama(config, "output.weight" not in source.tensors)
        return {**llama, **MISTRAL} if config.get("sliding_window") else llama
    if source.container == "gguf":
        return gguf_config(source)
    if source.architecture == "InternLM2ForCausalLM":
        return _llama({**values, "attention_bias": bool(values.get("bias"))}, values.get("tie_word_embeddings", False))
    if source.architecture == "ExaoneForCausalLM":
        renamed = {EXAONE.get(key, key): value for key, value in values.items()}
        return _llama(renamed, values.get("tie_word_embeddings", False))
    known = AS_KNOWN.get(source.architecture)
    return known(values) if known else values


def _translated(source: Source, values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The values of another container under Hugging Face's keys. Raises BadInput naming the missing sizes."""
    translated = {ours: values[theirs] for ours, theirs in keys.items() if values.get(theirs) is not None}
    absent = [keys[ours] for ours in NEEDED if ours not in translated]
    if absent:
        raise BadInput([Problem(f"{source.config_name}: {key}", "nothing", "a size of the model") for key in absent])
    translated.setdefault("num_key_value_heads", translated["num_attention_heads"])
    return {**DEFAULTS, **translated}


def _llama(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    experts = bool(config.get("num_local_experts"))
    return {
        "hidden_act": "silu",
        **config,
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "tie_word_embeddings": bool(tied),
    }
