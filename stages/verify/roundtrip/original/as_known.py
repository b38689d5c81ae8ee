"""Models that transformers has no class for, or whose names differ, as those of a class that computes the same.

Of each published modelling code: how its configuration says what LLaMA's, Qwen2's or Granite's does. Nothing here is shared with
the tables by which sources are converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]


def _llama(config: Config) -> dict[str, Any]:
    return {"hidden_act": "silu", **config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _yi(config: Config) -> dict[str, Any]:
    return {"rms_norm_eps": 1e-5, **_llama(config)}


def _internlm(config: Config) -> dict[str, Any]:
    base = config.get("rope_theta", (config.get("rotary") or {}).get("base", 10000.0))
    return {**_llama(config), "attention_bias": bool(config.get("bias")), "rope_theta": base}


def _internlm3(config: Config) -> dict[str, Any]:
    return {**_llama(config), "attention_bias": bool(config.get("qkv_bias")), "mlp_bias": bool(config.get("bias"))}


def _ernie(config: Config) -> dict[str, Any]:
    biased = bool(config.get("use_bias"))
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 131072}
    if not isinstance(config.get("rope_parameters"), Mapping):
        defaults["rope_theta"] = 500000.0
    return {**defaults, **_llama(config), "attention_bias": biased, "mlp_bias": biased}


def _helium(config: Config) -> dict[str, Any]:
    defaults = {"head_dim": 128, "rms_norm_eps": 1e-8, "max_position_embeddings": 4096}
    if not isinstance(config.get("rope_parameters"), Mapping):
        defaults["rope_theta"] = 100000.0
    return {**defaults, **_llama(config)}


def _baichuan(config: Config) -> dict[str, Any]:
    return {**_llama(config), "num_key_value_heads": config["num_attention_heads"]}


def _qwen2(config: Config) -> dict[str, Any]:
    return {"hidden_act": "silu", **config, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _qwen(config: Config) -> dict[str, Any]:
    return {
        **_qwen2(config),
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": config.get("seq_length") or config.get("max_position_embeddings"),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": config.get("rotary_emb_base", 10000.0),
        "use_sliding_window": False,
    }


def _qwen2_vl(config: Config) -> dict[str, Any]:
    """Positions of several axes are one and the same for text; their sections stay, to be compared."""
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = said.get("rope_type", said.get("type"))
    theta = config.get("rope_theta", said.get("rope_theta", 1000000.0))
    rest = {key: value for key, value in _qwen2(config).items() if key not in ("rope_parameters", "rope_scaling")}
    scaling = {"type": "mrope", "mrope_section": said.get("mrope_section")} if kind in (None, "default", "mrope") else dict(said)
    return {**rest, "rope_theta": theta, "rope_scaling": scaling}


def _minicpm(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "tie_word_embeddings": True,
        **_llama(config),
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": config.get("scale_emb", 1),
        "residual_multiplier": config.get("scale_depth", 1) / math.sqrt(config["num_hidden_layers"]),
        "logits_scaling": config["hidden_size"] / config.get("dim_model_base", 1),
        "attention_multiplier": 1 / math.sqrt(config.get("head_dim") or config["hidden_size"] // heads),
    }


AS_KNOWN: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "SkyworkForCausalLM": _llama,
    "LLaMAForCausalLM": _llama,
    "DeciLMForCausalLM": _llama,
    "XverseForCausalLM": _llama,
    "AquilaForCausalLM": _llama,
    "YiForCausalLM": _yi,
    "HeliumForCausalLM": _helium,
    "InternLMForCausalLM": _internlm,
    "InternLM3ForCausalLM": _internlm3,
    "Ernie4_5ForCausalLM": _ernie,
    "BaichuanForCausalLM": _baichuan,
    "BaiChuanForCausalLM": _baichuan,
    "MiMoForCausalLM": _qwen2,
    "QWenLMHeadModel": _qwen,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "MiniCPMForCausalLM": _minicpm,
}
