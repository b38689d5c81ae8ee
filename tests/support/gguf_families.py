"""GGUF files of the families that have an architecture of their own there, made of a Hugging Face directory as llama.cpp does it.

Names are those of the `gguf` package's map; metadata and values are those of llama.cpp's converter (`conversion/`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from pipeline.tensor.placement import Region
from stages.read import open_source

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral3",
    "InternLM2ForCausalLM": "internlm2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GraniteForCausalLM": "granite",
}
INTERLEAVED = ("llama", "mistral3", "internlm2", "granite")
ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face directory, in their own types."""
    result = {}
    for name, tensor in open_source(directory).tensors.items():
        region: Region = tuple((0, n) for n in tensor.shape)
        result[name] = np.array(tensor.block(region))
    return result


def write(
    path: Path,
    directory: Path,
    kind: str = "BF16",
    *,
    architecture: str = "",
    parts: int = 1,
    metadata: dict[str, Any] | None = None,
    vectors: tuple[str, ...] = (),
    packed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a file with the model of `directory`: matrices of type `kind`, the rest as float32.

    `architecture`: GGUF's, in the place of the usual one. `metadata`: further keys of it; None for one that is left out. `vectors`:
    modules whose only row is written as a vector, as early versions did. `packed`: makes the bytes of a matrix of type `kind`, in
    the place of the package's own quantizing. Returns the tensors by Hugging Face's names, float32, with
    the values that the file holds.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = architecture or ARCHITECTURES[config["architectures"][0]]
    held: dict[str, np.ndarray] = {}
    stored: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = {}
    for name, array in _stacked(_split(config, read_tensors(directory))).items():
        new = _name(name, architecture, config["num_hidden_layers"])
        plain = array.ndim < 2 or new.endswith(ALWAYS_FLOAT32)
        fits = array.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0
        type_ = gguf.GGMLQuantizationType["F32" if plain else kind if fits else "F16"]  # as llama.cpp falls back
        # float16 stays, and an addition to it is rounded there; other types are made float32 first.
        wide = array if array.dtype == np.float16 else array.astype(np.float32)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            wide = wide + wide.dtype.type(1)
        wide = wide.astype(np.float32)
        data = packed(wide) if packed and not plain else gguf.quants.quantize(wide, type_)
        held |= _unstacked(name, array.astype(np.float32) if plain else gguf.quants.dequantize(data, type_))
        if architecture in INTERLEAVED and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
            size = _head_size(config)
            data = data.reshape(-1, 2, size // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        stored[new] = (data[0] if new.rpartition(".")[0].endswith(vectors or "\0") else data), type_
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=-(-len(stored) // parts) if parts > 1 else 0)
    for key, value in {**_metadata(config, architecture), **(metadata or {})}.items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {n}" for n in range(config["vocab_size"])])
    for name, (data, type_) in stored.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    for name, factors in _factors(config).items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def save_twin(twin: Path, directory: Path, held: dict[str, np.ndarray]) -> None:
    """Save the values that a GGUF file holds as a Hugging Face directory, with the configuration of the one that it was made of."""
    twin.mkdir()
    config = json.loads((directory / "config.json").read_text())
    config.pop("torch_dtype", None)
    (twin / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tensors = {name: np.ascontiguousarray(array) for name, array in _joined(config, held).items()}
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _name(name: str, architecture: str, layers: int) -> str:
    """llama.cpp's name of a weight."""
    number = next(each for each, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    found = gguf.get_tensor_name_map(number, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


def _split(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """InternLM2's q, k and v taken apart: each kv head's queries, then its key, then its value."""
    result = {}
    groups, size = config["num_key_value_heads"], _head_size(config)
    for name, array in tensors.items():
        if ".attention.wqkv." not in name:
            result[name] = array
            continue
        heads = array.reshape(groups, -1, size, *array.shape[1:])
        for part, each in (("q", heads[:, :-2]), ("k", heads[:, -2]), ("v", heads[:, -1])):
            result[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = each.reshape(-1, *array.shape[1:])
    return result


def _joined(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_split`."""
    if config["architectures"] != ["InternLM2ForCausalLM"]:
        return tensors
    result = {name: array for name, array in tensors.items() if ".self_attn." not in name}
    groups, size = config["num_key_value_heads"], _head_size(config)
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
        heads = np.concatenate([each.reshape(groups, -1, size, *each.shape[1:]) for each in parts], axis=1)
        result[name.replace("self_attn.q_proj", "attention.wqkv")] = heads.reshape(-1, *parts[0].shape[1:])
    return result


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One stack of experts a projection, [experts, out, in], under the name without their number."""
    result: dict[str, Any] = {}
    for name, array in tensors.items():
        expert = EXPERT.fullmatch(name)
        if expert:
            result.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = array
        else:
            result[name] = array
    return {name: np.stack([each[n] for n in sorted(each)]) if isinstance(each, dict) else each for name, each in result.items()}


def _unstacked(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    if array.ndim < 3:
        return {name: array}
    front, _, rest = name.partition(".experts.")
    return {f"{front}.experts.{n}.{rest}": each for n, each in enumerate(array)}


def _metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}
    full = rope.get("full_attention", rope)
    longest, trained = config["max_position_embeddings"], full.get("original_max_position_embeddings")
    result = {
        "context_length": longest,
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
    }
    if architecture not in ("gemma", "gemma2"):
        result["rope.freq_base"] = float(full["rope_theta"])
    if architecture in INTERLEAVED:
        result |= {"vocab_size": config["vocab_size"], "rope.dimension_count": _head_size(config)}
    if full.get("rope_type") in ("linear", "yarn"):
        result |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
    if full.get("rope_type") == "yarn":
        result["rope.scaling.original_context_length"] = trained
        result |= {f"rope.scaling.yarn_{key}": full.get(key) for key in ("beta_fast", "beta_slow")}
    if architecture.endswith("moe"):
        result |= {
            "expert_count": config.get("num_experts") or config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
        }
    if architecture in ("gemma2", "gemma3"):
        result |= {
            "attention.sliding_window": config["sliding_window"],
            "final_logit_softcapping": config["final_logit_softcapping"],
            "attn_logit_softcapping": config["attn_logit_softcapping"],
        }
    if architecture == "granite":
        result |= {
            "attention.scale": config["attention_multiplier"],
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    if architecture == "phi3":
        trained = trained or config["original_max_position_embeddings"]
        result |= {
            "rope.scaling.original_context_length": trained,
            "rope.dimension_count": int(
                full.get("partial_rotary_factor", 1.0) * config["hidden_size"] / config["num_attention_heads"]
            ),
            "attention.sliding_window": config["sliding_window"] or 0,
        }
        if full.get("long_factor"):
            result["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(longest / trained) / math.log(trained))
    return result


def _factors(config: dict[str, Any]) -> dict[str, list[float]]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {f"rope_factors_{kind}.weight": rope[f"{kind}_factor"] for kind in ("long", "short") if f"{kind}_factor" in rope}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)
