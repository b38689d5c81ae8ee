"""Tiny seeded checkpoints of every kind that the tests convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import pipeline.model.dtypes

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face checkpoint of this configuration, written out by hand, not by headrace's tables."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * head_size(config), config["num_key_value_heads"] * head_size(config)
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        result["lm_head.weight"] = (vocab, hidden)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        for name, shape in attention.items():
            result[f"{layer}self_attn.{name}.weight"] = shape
            if config.get("attention_bias"):
                result[f"{layer}self_attn.{name}.bias"] = shape[:1]
        result[f"{layer}input_layernorm.weight"] = result[f"{layer}post_attention_layernorm.weight"] = (hidden,)
        experts = config.get("num_local_experts", 0)
        for e in range(experts):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            result |= {
                f"{expert}w1.weight": (inner, hidden),
                f"{expert}w2.weight": (hidden, inner),
                f"{expert}w3.weight": (inner, hidden),
            }
        if experts:
            result[f"{layer}block_sparse_moe.gate.weight"] = (experts, hidden)
            continue
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for name, shape in mlp.items():
            result[f"{layer}mlp.{name}.weight"] = shape
            if config.get("mlp_bias"):
                result[f"{layer}mlp.{name}.bias"] = shape[:1]
    return result


def values(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of the configuration's dtype."""
    random = np.random.default_rng(seed)
    dtype = pipeline.model.dtypes.BY_TARGET[config.get("torch_dtype") or config.get("dtype", "float16")].numpy
    return {name: random.standard_normal(shape, dtype=np.float32).astype(dtype) for name, shape in shapes(config).items()}


def write(directory: Path, config: dict[str, Any], *, shards: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Save a checkpoint as Hugging Face does, in one file or in shards with an index; returns its tensors."""
    tensors = values(config, seed)
    save(directory, config, tensors, shards=shards)
    return tensors


def save(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for n in range(shards):
        part = dict(list(tensors.items())[n::shards])
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_wide_layer(directory: Path) -> dict[str, np.ndarray]:
    """Save a model of one layer of 70B's shape, whose larger matrices are 470 MB each; return its tensors, float16."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    config = {**LLAMA, **shape, "num_hidden_layers": 1, "vocab_size": 256}
    random = np.random.default_rng(0)
    rows = {width: random.normal(0, 0.02, (256, width)).astype(np.float16) for width in (8192, 28672)}
    tensors = {
        name: np.ones(size, np.float16) if len(size) == 1 else np.tile(rows[size[1]], (size[0] // 256, 1))
        for name, size in shapes(config).items()
    }
    save(directory, config, tensors)
    return tensors
