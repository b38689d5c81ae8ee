"""Small GGUF models, written by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 48
TENSORS = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "output.weight": (VOCAB, HIDDEN),
}
for _n in range(LAYERS):
    TENSORS |= {
        f"blk.{_n}.attn_norm.weight": (HIDDEN,),
        f"blk.{_n}.attn_q.weight": (HIDDEN, HIDDEN),
        f"blk.{_n}.attn_k.weight": (HIDDEN // 2, HIDDEN),
        f"blk.{_n}.attn_v.weight": (HIDDEN // 2, HIDDEN),
        f"blk.{_n}.attn_output.weight": (HIDDEN, HIDDEN),
        f"blk.{_n}.ffn_norm.weight": (HIDDEN,),
        f"blk.{_n}.ffn_gate.weight": (INNER, HIDDEN),
        f"blk.{_n}.ffn_up.weight": (INNER, HIDDEN),
        f"blk.{_n}.ffn_down.weight": (HIDDEN, INNER),
    }
METADATA: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": VOCAB,
    "general.name": "a small model",
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(VOCAB)],
    "tokenizer.ggml.scores": [float(n) for n in range(VOCAB)],
}


def write(
    path: Path,
    *,
    metadata: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    kinds: dict[str, str] | None = None,
    architecture: str = "llama",
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A float16 model; with other or fewer metadata and tensors, and with tensors whose bytes are said to be of another type."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    writer.data_alignment = (metadata or {}).get("general.alignment", 32) or 32
    for key, value in {**METADATA, **(metadata or {})}.items():
        if key not in without:
            _add(writer, key, value)
    random = np.random.default_rng(0)
    made = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name, shape in TENSORS.items()}
    for name, values in {**made, **(tensors or {})}.items():
        kind = gguf.GGMLQuantizationType[kinds[name]] if kinds and name in kinds else None
        if name not in without:
            writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header_end(path: Path) -> int:
    """Where the data of the first tensor begins."""
    return int(gguf.GGUFReader(path).data_offset)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
