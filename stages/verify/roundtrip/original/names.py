"""The names of a source's weights as Hugging Face has them, whichever container they come from.

Facts: checkpoint format, sections 3 and 10; families, InternLM2 and Exaone; GGUF's names are llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BadInput, Problem
from stages.verify.roundtrip.original.numbers import Numbers, Stored, Ungrouped, Unpermuted

# Computed by whoever runs the model, whatever a source holds of them.
COMPUTED = re.compile(r"(.+\.)?(rotary_emb|rotary|rope)\.(inv_freq|freqs)|rope_freqs\.weight")
# Models whose experts are called w1 (the activated projection), w3 and w2; others say gate_proj, up_proj and down_proj.
NUMBERED = ("MixtralForCausalLM", "PhiMoEForCausalLM", "PhimoeForCausalLM")
STACK = re.compile(r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)(\.weight)?")
ROUTER = re.compile(r"(.+)\.mlp\.(gate|router)\.weight")


@dataclass(frozen=True)
class Names:
    """A family's names for LLaMA's modules.

    `layer`: what a layer's modules begin with, its number as the first group. `modules`: by the name after that, or the whole
    name outside of layers, Hugging Face's. `turned`: those whose heads have their rotary halves interleaved.
    """

    layer: re.Pattern[str]
    modules: Mapping[str, str]
    turned: tuple[str, ...] = ()


META = Names(
    re.compile(r"layers\.(\d+)\."),
    {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    },
    ("attention.wq", "attention.wk"),
)
GGUF = Names(
    re.compile(r"blk\.(\d+)\."),
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "block_sparse_moe.gate",
    },
    ("attn_q", "attn_k"),
)
INTERNLM2 = Names(
    re.compile(r"model\.layers\.(\d+)\."),
    {
        "model.tok_embeddings": "model.embed_tokens",
        "model.norm": "model.norm",
        "output": "lm_head",
        "attention_norm": "input_layernorm",
        "attention.wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    },
)
EXAONE = Names(
    re.compile(r"transformer\.h\.(\d+)\."),
    {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
        "ln_1": "input_layernorm",
        "attn.attention.q_proj": "self_attn.q_proj",
        "attn.attention.k_proj": "self_attn.k_proj",
        "attn.attention.v_proj": "self_attn.v_proj",
        "attn.attention.out_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc_0": "mlp.gate_proj",
        "mlp.c_fc_1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
)
# llama.cpp's experts: one stack a projection; early versions wrote a matrix an expert.
GGUF_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)(?:_exps|\.(\d+))\.weight")


def canonical(container: str, architecture: str, config: Mapping[str, Any], numbers: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """A source's weights under Hugging Face's names for a model that `config` (as `canonical_config` gives it) describes.

    What no name is known for keeps its own. Raises BadInput where two tensors are one weight.
    """
    heads = int(config.get("num_attention_heads") or 1)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    kept = {name: held for name, held in numbers.items() if not COMPUTED.fullmatch(name)}
    result: dict[str, Numbers] = {}
    origins: dict[str, str] = {}
    for origin, held in kept.items():
        if container == "meta":
            found = _renamed(origin, held, META, size)
        elif container == "gguf":
            found = _gguf_experts(origin, held) or _renamed(origin, held, GGUF, size)
        elif architecture == "InternLM2ForCausalLM":
            found = _wqkv(origin, held, kv_heads, size) or _renamed(origin, held, INTERNLM2, size)
        elif architecture == "ExaoneForCausalLM":
            found = _renamed(origin, held, EXAONE, size)
        else:
            found = _experts(origin, held, architecture in NUMBERED)
        twice = [name for name in found if name in result]
        if twice:
            raise BadInput([Problem(origin, f"{twice[0]}, which {origins[twice[0]]} is too", "one tensor for a weight")])
        result |= found
        origins |= dict.fromkeys(found, origin)
    return result


def _renamed(name: str, held: Numbers, names: Names, head_size: int) -> dict[str, Numbers]:
    layer = names.layer.match(name)
    module, _, parameter = name[layer.end() if layer else 0 :].rpartition(".")
    theirs = names.modules.get(module)
    # Modules of a layer are none outside of one, and the other way round.
    if theirs is None or bool(layer) == theirs.startswith(("model.", "lm_head")):
        return {name: held}
    front = f"model.layers.{layer[1]}." if layer else ""
    return {f"{front}{theirs}.{parameter}": Unpermuted(held, head_size) if module in names.turned else held}


def _wqkv(name: str, held: Numbers, groups: int, head_size: int) -> dict[str, Numbers]:
    found = re.fullmatch(r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)", name)
    if not found:
        return {}
    front = f"model.layers.{found[1]}.self_attn."
    return {f"{front}{part}_proj.{found[2]}": Ungrouped(held, part, groups, head_size) for part in "qkv"}


def _experts(name: str, held: Numbers, numbered: bool) -> dict[str, Numbers]:
    """Hugging Face's own names; of transformers 5's stacks [E, 2 I, H] and [E, H, I], those of the single experts."""
    stack = STACK.fullmatch(name)
    if stack and isinstance(held, Stored) and len(held.shape) == 3:
        rows = held.shape[1]
        block = "block_sparse_moe" if numbered else "mlp"
        front = f"{stack[1]}.{block}.experts"
        parts = [("down", 0, rows)] if stack[2] == "down_proj" else [("gate", 0, rows // 2), ("up", rows // 2, rows // 2)]
        return _split(front, held, parts, _numbered if numbered else lambda part: f"{part}_proj")
    router = ROUTER.fullmatch(name) if numbered else None
    return {f"{router[1]}.block_sparse_moe.gate.weight" if router else name: held}


def _gguf_experts(name: str, held: Numbers) -> dict[str, Numbers]:
    found = GGUF_EXPERTS.fullmatch(name)
    if not found:
        return {}
    front = f"model.layers.{found[1]}.block_sparse_moe.experts"
    if found[3]:
        return {f"{front}.{found[3]}.{_numbered(found[2])}.weight": held}
    assert isinstance(held, Stored), "what a GGUF file holds is stored"
    return _split(front, held, [(found[2], 0, held.shape[1])], _numbered)


def _split(front: str, stack: Stored, parts: list[tuple[str, int, int]], called: Callable[[str], str]) -> dict[str, Numbers]:
    """`parts`, each (projection, first row, rows), of every expert of a stack."""
    return {
        f"{front}.{expert}.{called(part)}.weight": stack.part(expert, first, count)
        for expert in range(stack.shape[0])
        for part, first, count in parts
    }


def _numbered(part: str) -> str:
    return {"gate": "w1", "down": "w2", "up": "w3"}[part]
