"""Make synthetic checkpoints of real shapes: random bytes, or sparse files that take no disk space."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 80,
    },
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 126,
    },
    # Qwen3's mixture of experts: 36,945 tensors.
    "235B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_hidden_layers": 94,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
SHARD_BYTES = 4 << 30


def tensors(config: dict) -> list[tuple[str, list[int]]]:
    """List the names and shapes of a Hugging Face Llama, or Qwen3 with experts, of this configuration, in file order."""
    hidden, vocab, experts = config["hidden_size"], config["vocab_size"], config.get("num_experts", 0)
    inner = config["moe_intermediate_size" if experts else "intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = (head * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    rows = [("model.embed_tokens.weight", [vocab, hidden])]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        rows.append((prefix + "input_layernorm.weight", [hidden]))
        for mlp in [f"mlp.experts.{expert}." for expert in range(experts)] or ["mlp."]:
            rows += [
                (f"{prefix}{mlp}down_proj.weight", [hidden, inner]),
                (f"{prefix}{mlp}gate_proj.weight", [inner, hidden]),
                (f"{prefix}{mlp}up_proj.weight", [inner, hidden]),
            ]
        if experts:
            rows += [
                (prefix + "mlp.gate.weight", [experts, hidden]),
                (prefix + "self_attn.k_norm.weight", [head]),
                (prefix + "self_attn.q_norm.weight", [head]),
            ]
        rows += [
            (prefix + "post_attention_layernorm.weight", [hidden]),
            (prefix + "self_attn.k_proj.weight", [kv, hidden]),
            (prefix + "self_attn.o_proj.weight", [hidden, q]),
            (prefix + "self_attn.q_proj.weight", [q, hidden]),
            (prefix + "self_attn.v_proj.weight", [kv, hidden]),
        ]
    return [*rows, ("model.norm.weight", [hidden]), ("lm_head.weight", [vocab, hidden])]


def make(
    directory: Path,
    shape: str,
    layers: int | None = None,
    sparse: bool = False,
    noise: bytes = b"",
    shard_bytes: int = SHARD_BYTES,
    **sizes: int,
) -> int:
    """Write a sharded bf16 checkpoint, and return the bytes of its tensors. Sparse files read as zeros and take no disk space.

    `noise` is repeated as the tensors' bytes; by default random bytes, some of which are infinite or NaN as bf16. `sizes` stand in
    for those of the shape.
    """
    config: dict = {**SHAPES[shape], **sizes}
    if layers:
        config["num_hidden_layers"] = layers
    directory.mkdir(parents=True, exist_ok=True)
    groups: list[list[tuple[str, list[int]]]] = [[]]
    filled = 0
    for name, dims in tensors(config):
        nbytes = 2 * _count(dims)
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, dims))
        filled += nbytes
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        total += _write(directory / file, group, sparse, noise)
        weight_map |= {name: file for name, _ in group}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    extra = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False,
    }  # fmt: skip
    if config.get("num_experts"):
        extra |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        }
    (directory / "config.json").write_text(json.dumps(config | extra))
    return total


def _count(dims: list[int]) -> int:
    return dims[0] * (dims[1] if len(dims) > 1 else 1)


def weights(count: int = 16 << 20) -> bytes:
    """Return the bytes of `count` finite bf16 numbers distributed like weights: normal, with standard deviation 0.02."""
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32) * 0.02
    return values.astype(ml_dtypes.bfloat16).tobytes()


def make_packed(directory: Path, shape: str, layers: int, method: str, group: int = 128, **sizes: int) -> int:
    """Write a 4-bit GPTQ or AWQ checkpoint of random codes, one shard for each layer; return the bytes of its packed modules.

    `sizes` stand in for those of the shape.
    """
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    config = {**SHAPES[shape], "num_hidden_layers": layers, **sizes}
    weight_map, packed = {}, 0

    def words(*dims: int) -> np.ndarray:
        return random.integers(-(1 << 31), 1 << 31, dims, dtype=np.int64).astype(np.int32)

    def shard(file: str, arrays: dict[str, np.ndarray]) -> None:
        save_file(arrays, directory / file)
        weight_map.update(dict.fromkeys(arrays, file))

    rows: dict[int, dict[str, np.ndarray]] = {}
    for name, dims in tensors(config):
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        arrays = rows.setdefault(layer, {})
        if len(dims) == 1 or layer < 0:
            arrays[name] = np.full(dims, 0.02, dtype=np.float16)
            continue
        (out, features), module = dims, name.removesuffix(".weight")
        shape_of = (features // 8, out) if method == "gptq" else (features, out // 8)
        arrays[f"{module}.qweight"] = words(*shape_of)
        arrays[f"{module}.qzeros"] = np.full((features // group, out // 8), 0x77777777, dtype=np.int32)
        arrays[f"{module}.scales"] = random.uniform(0.001, 0.01, (features // group, out)).astype(np.float16)
        packed += sum(arrays[f"{module}.{part}"].nbytes for part in ("qweight", "qzeros", "scales"))
    for layer, arrays in rows.items():
        shard(f"model-{layer + 1:05}.safetensors", arrays)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {"quant_method": method, "bits": 4, "group_size": group, "sym": True, "desc_act": False, "version": "gemm"}
    extra = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "float16", "quantization_config": settings,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | extra))
    return packed


def _write(path: Path, group: list[tuple[str, list[int]]], sparse: bool, noise: bytes) -> int:
    header, offset = {}, 0
    for name, dims in group:
        end = offset + 2 * _count(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + offset)
            return offset
        noise = noise or os.urandom(64 << 20)
        for start in range(0, offset, len(noise)):
            file.write(noise[: min(len(noise), offset - start)])
    return offset
