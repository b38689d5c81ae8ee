"""LLaMA models under the names of families that have others: InternLM2 and Exaone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "model.norm": "model.norm",
    "input_layernorm": "attention_norm",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
EXAONE = {
    "model.embed_tokens": "transformer.wte",
    "lm_head": "lm_head",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.attention.q_proj",
    "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj",
    "self_attn.o_proj": "attn.attention.out_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}


def renamed(tensors: Arrays, names: Mapping[str, str], layers: str) -> Arrays:
    """A LLaMA model's tensors under other names, those of `names`; `layers` is what stands in front of a layer's number."""
    result = {}
    for name, values in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module.startswith("model.layers."):
            number, _, rest = module.removeprefix("model.layers.").partition(".")
            module = f"{layers}.{number}.{names[rest]}" if rest in names else ""
        else:
            module = names[module]
        if module:
            result[f"{module}.{parameter}"] = values
    return result


def internlm2(config: dict[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Arrays]:
    """A LLaMA model as InternLM2: each kv head's queries, then its key, then its value, in one tensor."""
    result = renamed(tensors, INTERNLM2, "model.layers")
    kv_heads = config["num_key_value_heads"]
    for name in [name for name in tensors if ".q_proj." in name]:
        heads = []
        for part in "qkv":
            values = tensors[name.replace("q_proj", f"{part}_proj")]
            heads.append(values.reshape(kv_heads, -1, *values.shape[1:]))
        packed = np.concatenate(heads, axis=1)
        result[name.replace("self_attn.q_proj", "attention.wqkv")] = packed.reshape(-1, *packed.shape[2:])
    rest = {key: value for key, value in config.items() if key != "attention_bias"}
    bias = config.get("attention_bias", False)
    return {**rest, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": bias}, result


def exaone(config: dict[str, Any], tensors: Arrays) -> tuple[dict[str, Any], Arrays]:
    """A LLaMA model as Exaone."""
    result = dict(config)
    for ours, theirs in (
        ("num_hidden_layers", "num_layers"),
        ("hidden_act", "activation_function"),
        ("rms_norm_eps", "layer_norm_epsilon"),
    ):
        result[theirs] = result.pop(ours)
    tensors = renamed(tensors, EXAONE, "transformer.h")
    return {**result, "architectures": ["ExaoneForCausalLM"], "model_type": "exaone"}, tensors
