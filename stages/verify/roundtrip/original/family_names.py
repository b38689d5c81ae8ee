"""Other names of LLaMA's modules: those of Meta's files, and of families that say the same otherwise.

Facts: docs/format/checkpoint.md, sections 3 and 10; docs/format/families.md, sections 8 and 9.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyNames:
    """A family's names for LLaMA's modules.

    `layer`: matches the front of a layer's names, with the layer's number as its first group. `modules`: Hugging Face's name of
    each module by the family's, without that front. `turned`: modules whose heads have their rotary halves interleaved.
    """

    layer: re.Pattern[str]
    modules: Mapping[str, str]
    turned: tuple[str, ...] = ()


META = FamilyNames(
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
INTERNLM2 = FamilyNames(
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
EXAONE = FamilyNames(
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
QWEN = FamilyNames(
    re.compile(r"transformer\.h\.(\d+)\."),
    {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "lm_head": "lm_head",
        "ln_1": "input_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
)
YI = FamilyNames(re.compile(r"model\.layers\.(\d+)\."), {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"})
ERNIE = FamilyNames(
    re.compile(r"model\.layers\.(\d+)\."),
    {"self_attn.q_proj": "self_attn.q_proj", "self_attn.k_proj": "self_attn.k_proj"},
    ("self_attn.q_proj", "self_attn.k_proj"),
)
