"""Tiny GGUF files, written with the `gguf` package from the tensors of a Hugging Face checkpoint, as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support.checkpoints import head_size

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def tensors(config: dict[str, Any], source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file, float32: llama.cpp's names, rotary halves interleaved, experts stacked."""
    result = {}
    for name, array in source.items():
        module, _, parameter = name.rpartition(".")
        layer, short = ("", module) if module in NAMES else tuple(module.removeprefix("model.layers.").split(".", 1))
        if short not in NAMES:
            continue
        if short in ("self_attn.q_proj", "self_attn.k_proj"):
            size = head_size(config)
            array = array.reshape(-1, 2, size // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        result[f"blk.{layer}.{NAMES[short]}.{parameter}" if layer else f"{NAMES[short]}.{parameter}"] = array.astype(np.float32)
    for n in range(config["num_hidden_layers"] if config.get("num_local_experts") else 0):
        for theirs, ours in EXPERTS.items():
            names = [f"model.layers.{n}.block_sparse_moe.experts.{e}.{theirs}.weight" for e in range(config["num_local_experts"])]
            result[f"blk.{n}.{ours}.weight"] = np.stack([source[name] for name in names]).astype(np.float32)
    return result


def write(
    path: Path,
    config: dict[str, Any],
    source: dict[str, np.ndarray],
    kind: str = "F16",
    *,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    parts: int = 1,
) -> dict[str, np.ndarray]:
    """Write a file with matrices of type `kind` and vectors as float32; returns what the tensors hold once read again, as float32.

    `metadata` are further keys of architecture `llama`, `extra` further float32 tensors; of several `parts`, each has a file.
    """
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=-(-len(tensors(config, source)) // parts) if parts > 1 else 0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {n}" for n in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.{key}", value)
    held = {}
    for name, array in tensors(config, source).items():
        type_ = gguf.GGMLQuantizationType[kind if array.ndim > 1 and "ffn_gate_inp" not in name else "F32"]
        data = gguf.quants.quantize(array, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
        held[name] = gguf.quants.dequantize(data, type_)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
