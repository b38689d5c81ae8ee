"""GGUF's files: the configuration and the names of weights as Hugging Face has them, by architecture.

Source: llama.cpp's converter (`conversion/`), which made the files of Hugging Face's, read backwards; and its loader
(`src/models/`) for what no key says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import Source
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers, Unpermuted

# transformers' class and model_type.
CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "llama+experts": ("MixtralForCausalLM", "mixtral"),
    "mistral3": ("MistralForCausalLM", "mistral"),
    "internlm2": ("LlamaForCausalLM", "llama"),
    "granite": ("GraniteForCausalLM", "granite"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
INTERLEAVED = ("llama", "llama+experts", "mistral3", "internlm2", "granite")  # models whose q and k have their rotary halves so
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
# Hugging Face's key, and GGUF's less the architecture.
KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "attention_bias": "attention.bias",
    "vocab_size": "vocab_size",
    "rope_scaling": "rope_scaling",
}
MIXTURE = {"num_experts_per_tok": "expert_used_count", "moe_intermediate_size": "expert_feed_forward_length"}
QWEN_MIXTURE = {"num_experts": "expert_count", "norm_topk_prob": "expert_weights_norm", **MIXTURE}
OWN_KEYS: Mapping[str, Mapping[str, str]] = {
    "llama+experts": {"num_local_experts": "expert_count", **MIXTURE},
    "qwen2moe": {**QWEN_MIXTURE, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
    "qwen3moe": QWEN_MIXTURE,
    "phi3": {
        "sliding_window": "attention.sliding_window",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "partial_rotary_factor": "rope.share",
    },
    "gemma2": {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
    },
    "gemma3": {
        "sliding_window": "attention.sliding_window",
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "rope_local_base_freq": "rope.freq_base_swa",
        "final_logit_softcapping": "final_logit_softcapping",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
    },
    "granite": {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
}
# What llama.cpp computes where a file has no key.
DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "pad_token_id": None}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
OWN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "qwen2moe": {"use_sliding_window": False, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3": {"use_sliding_window": False},
    "qwen3moe": {"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mistral3": {"sliding_window": None},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
}
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models whose scores are divided by the width's share of a head
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

LAYER = re.compile(r"blk\.(\d+)\.")
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OWN_MODULES: Mapping[str, Mapping[str, str]] = {
    "llama+experts": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "gemma2": AROUND,
    "gemma3": AROUND,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},  # the activated half first
}
# Experts: one stack a projection; early versions wrote a matrix an expert.
EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)(?:_exps|\.(\d+))\.weight")
NUMBERED = {"gate": "w1", "down": "w2", "up": "w3"}


@dataclass(frozen=True)
class Less(Numbers):
    """`base` less 1, as float64, which holds the difference of any float32 from about 1e-9 on, and gives it back when 1 is added.

    Norms of Gemma's, to which llama.cpp's converter has added 1.
    """

    base: Numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    @property
    def exact(self) -> bool:
        return self.base.exact

    def rows(self, start: int, stop: int) -> np.ndarray:
        result: np.ndarray = np.subtract(self.base.rows(start, stop), 1, dtype=np.float64)
        return result


def gguf_config(source: Source) -> dict[str, Any]:
    """The config.json by which transformers runs a GGUF file's model. Raises BadInput naming the sizes that it lacks."""
    architecture = source.architecture
    keys = {**KEYS, **OWN_KEYS.get(architecture, {})}
    said = {ours: source.config[theirs] for ours, theirs in keys.items() if source.config.get(theirs) is not None}
    absent = [keys[key] for key in NEEDED if key not in said]
    if absent:
        raise BadInput([Problem(f"{source.config_name}: {key}", "nothing", "a size of the model") for key in absent])
    config = {**DEFAULTS, **OWN_DEFAULTS.get(architecture, {}), **said}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if architecture in LARGEST:
        width = config["hidden_size"] // config["num_attention_heads"]
        largest = config["num_hidden_layers"] == LARGEST[architecture]
        config.setdefault("query_pre_attn_scalar", width if largest else config.get("head_dim", width))
    if not config.get("sliding_window", True):
        config["sliding_window"] = None  # 0 of a model without
    if config.get("partial_rotary_factor") == 1:
        del config["partial_rotary_factor"]
    name, model_type = CLASSES.get(architecture, CLASSES["llama"])
    tied = not any(each.startswith("output.") for each in source.tensors)
    return {**config, "architectures": [name], "model_type": model_type, "tie_word_embeddings": tied}


def gguf_names(name: str, numbers: Numbers, architecture: str, head_size: int) -> dict[str, Numbers]:
    """A GGUF tensor's weights by Hugging Face's names, as Hugging Face has their values; its own name where no table has it."""
    if expert := EXPERT.fullmatch(name):
        return _experts(expert, numbers, architecture)
    layer = LAYER.match(name)
    module, _, parameter = name[layer.end() if layer else 0 :].rpartition(".")
    theirs = {**MODULES, **OWN_MODULES.get(architecture, {})}.get(module)
    # A layer's module outside a layer, or the other way round, is no module of the table.
    if theirs is None or bool(layer) == theirs.startswith(("model.", "lm_head")):
        return {name: numbers}
    if architecture in INTERLEAVED and module in ("attn_q", "attn_k"):
        numbers = Unpermuted(numbers, head_size)
    if architecture in NORMS_PLUS_ONE and theirs.endswith("norm"):
        numbers = Less(numbers)
    return {f"model.layers.{layer[1]}.{theirs}.{parameter}" if layer else f"{theirs}.{parameter}": numbers}


def _experts(match: re.Match[str], numbers: Numbers, architecture: str) -> dict[str, Numbers]:
    layer, part, number = match.groups()
    mixtral = architecture == "llama+experts"
    projection = NUMBERED[part] if mixtral else f"{part}_proj"
    prefix = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}.experts"
    if number is not None:
        return {f"{prefix}.{number}.{projection}.weight": numbers}
    assert isinstance(numbers, StoredNumbers), "what a GGUF file holds is stored"
    stack = numbers
    return {f"{prefix}.{n}.{projection}.weight": stack.part(n, 0, stack.shape[1]) for n in range(stack.shape[0])}
