"""Make GGUF files of real shapes whose blocks are random codes with small scales."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from benchmarks.models import SHAPES, tensors

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
}
# Where blocks have their float16 scales.
SCALES = {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "Q4_0": (0,)}
ROWS = 1024  # of random codes, which are repeated


def make_gguf(path: Path, shape: str, layers: int, kind: str, **sizes: int) -> int:
    """Write a file whose matrices are of one type of blocks; returns its size in bytes. `sizes` stand in for those of the shape."""
    config = {**SHAPES[shape], "num_hidden_layers": layers, **sizes}
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {n}" for n in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    type_ = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[type_]
    random, rows = np.random.default_rng(0), dict[int, np.ndarray]()
    for name, dims in tensors(config):
        module = name.removesuffix(".weight")
        layer, short = ("", module) if module in NAMES else tuple(module.removeprefix("model.layers.").split(".", 1))
        new = f"blk.{layer}.{NAMES[short]}.weight" if layer else f"{NAMES[short]}.weight"
        if len(dims) == 1:
            writer.add_tensor(new, np.ones(dims, np.float32))
            continue
        width = dims[1] // elements * size
        if width not in rows:
            blocks = random.integers(0, 256, (ROWS, width // size, size), dtype=np.uint8)
            for place in SCALES[kind]:
                blocks[..., place : place + 2] = np.array([0.0005], np.float16).view(np.uint8)
            rows[width] = blocks.reshape(ROWS, width)
        writer.add_tensor(new, np.tile(rows[width], (-(-dims[0] // ROWS), 1))[: dims[0]], raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size
