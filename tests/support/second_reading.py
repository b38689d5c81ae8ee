"""A LLaMA checkpoint read a second time, by the libraries of its containers and none of headrace's code, and the ranks it gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pipeline.model.parallelism import Parallelism
from tests.support import gguf_files, meta_files
from tests.support.rank_oracle import Case, model_of, oracle, sharding_of

Arrays = dict[str, np.ndarray]

TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
OURS = {
    "model.embed_tokens": "transformer.vocab_embedding",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
    "self_attn.q_proj": "attention.qkv.q",
    "self_attn.k_proj": "attention.qkv.k",
    "self_attn.v_proj": "attention.qkv.v",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}
# config.json's keys, by those of the source, and what transformers takes where there is none; None: it must be there.
SIZES: dict[str, tuple[tuple[str, ...], Any]] = {
    "vocab_size": (("vocab_size",), 32000),
    "hidden_size": (("hidden_size", "dim", "embedding_length"), 4096),
    "num_hidden_layers": (("num_hidden_layers", "n_layers", "block_count"), 32),
    "num_attention_heads": (("num_attention_heads", "n_heads", "attention.head_count"), 32),
    "num_key_value_heads": (("num_key_value_heads", "n_kv_heads", "attention.head_count_kv"), None),
    "intermediate_size": (("intermediate_size", "hidden_dim", "feed_forward_length"), 11008),
    "max_position_embeddings": (("max_position_embeddings", "max_seq_len", "context_length"), 2048),
    "hidden_act": (("hidden_act",), "silu"),
    "norm_epsilon": (("rms_norm_eps", "norm_eps", "attention.layer_norm_rms_epsilon"), 1e-6),
    "rotary_base": (("rope_theta", "rope.freq_base"), 10000.0),
    "rotary_scaling": (("rope_scaling",), None),
    "attn_bias": (("attention_bias",), False),
    "mlp_bias": (("mlp_bias",), False),
}
# Keys of config.json alone: Meta's code reads none of them from params.json.
HUGGING_FACES = ("hidden_act", "attention_bias", "mlp_bias", "rope_scaling", "max_position_embeddings")


class Unread(Exception):
    """The library refuses what headrace has read."""


def hugging_face(model: Path) -> Arrays:
    """The tensors of a directory: of all shards that its index names, or of its only file."""
    import torch
    from safetensors import safe_open

    result: Arrays = {}
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    result |= {name: _numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            else:
                result |= {name: _numpy(tensor) for name, tensor in loaded(torch, path).items()}
        except Exception as error:
            raise Unread(f"{path.name}: {type(error).__name__} {error}") from error
    return result


def loaded(torch: Any, path: Path) -> Mapping[str, Any]:
    """The state dict in a file of torch.save, wrapped or not."""
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\3\4"
    # Mapped, as otherwise the CRCs of an archive's records would be looked at, which a conversion does on request alone.
    value = torch.load(path, weights_only=True, map_location="cpu", mmap=archive)
    inside = [value[key] for key in ("state_dict", "model", "module") if isinstance(value.get(key), dict)]
    result: Mapping[str, Any] = inside[0] if inside else value
    return result


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        array: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    return tensor.numpy()


def meta(model: Path) -> Arrays:
    """The tensors of Meta's parts, joined, under the names of Hugging Face and with rotary halves apart."""
    import torch

    params = json.loads((model / "params.json").read_text())
    try:
        parts = [{name: _numpy(each) for name, each in loaded(torch, path).items()} for path in sorted(model.glob("*.pth"))]
    except Exception as error:
        raise Unread(f"{type(error).__name__} {error}") from error
    theirs = {short: name for name, short in meta_files.NAMES.items()}
    result: Arrays = {}
    for name in parts[0]:
        module, _, parameter = name.rpartition(".")
        layer, short = ("", module) if module in theirs else tuple(module.removeprefix("layers.").split(".", 1))
        if short not in theirs:
            continue
        if short in meta_files.ROWS or short in meta_files.COLUMNS or short == "tok_embeddings":
            array = np.concatenate([part[name] for part in parts], axis=0 if short in meta_files.ROWS else 1)
        else:
            array = parts[0][name]
        if short in ("attention.wq", "attention.wk"):
            half = params["dim"] // params["n_heads"] // 2
            array = array.reshape(-1, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        result[f"model.layers.{layer}.{theirs[short]}.{parameter}" if layer else f"{theirs[short]}.{parameter}"] = array
    return result


def gguf(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The tensors of a GGUF file under the names of Hugging Face, and its metadata of architecture `llama`."""
    import gguf as library

    try:
        reader = library.GGUFReader(path)
        arrays = {each.name: library.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise Unread(f"{type(error).__name__} {error}") from error
    config = {name.removeprefix("llama."): value for name, value in fields.items()}
    theirs = {short: name for name, short in gguf_files.NAMES.items()}
    half = config.get("attention.key_length", config["embedding_length"] // config["attention.head_count"]) // 2
    result: Arrays = {}
    for name, array in arrays.items():
        module, _, parameter = name.rpartition(".")
        layer, short = ("", module) if module in theirs else tuple(module.removeprefix("blk.").split(".", 1))
        if short not in theirs:
            continue
        if short in ("attn_q", "attn_k"):
            array = array.reshape(-1, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        result[f"model.layers.{layer}.{theirs[short]}.{parameter}" if layer else f"{theirs[short]}.{parameter}"] = array
    return result, config


def differences(source: Arrays, said: Mapping[str, Any], output: Mapping[str, Any], ranks: list[Arrays]) -> list[str]:
    """Compare an output with a source that was read a second time.

    Parameters
    ----------
    source
        Tensors by Hugging Face's names.
    said
        The source's configuration.
    output
        What config.json says.
    ranks
        The tensors of the rank files.
    """
    wrong = [
        f"config.json: {key} {output[key]!r}, and the source's {value!r}"
        for key, value in _expected(said, output)
        if output[key] != value
    ]
    dtype = TYPES[output["dtype"]]
    renamed = {_renamed(name): _rounded(array, dtype) for name, array in source.items()}
    if "lm_head.weight" not in renamed and "transformer.vocab_embedding.weight" in renamed:
        renamed["lm_head.weight"] = renamed["transformer.vocab_embedding.weight"]
    mapping = output["mapping"]
    sizes = [output[key] for key in ("num_attention_heads", "num_key_value_heads", "head_size", "hidden_size", "intermediate_size")]
    model = model_of(*sizes, output["vocab_size"], output["num_hidden_layers"])
    model = replace(model, attn_bias=output["attn_bias"], mlp_bias=output["mlp_bias"])
    tp, pp = mapping["tp_size"], mapping["pp_size"]
    case = Case(sharding_of(model, Parallelism(tp, pp, 1, tp, 1)))
    for number, rank in enumerate(ranks):
        expected = oracle(case, renamed, number)
        if expected.keys() != rank.keys():
            wrong.append(f"rank {number}: tensors {sorted(expected.keys() ^ rank.keys())[:4]}")
            continue
        wrong += [f"rank {number}: {name}" for name, array in expected.items() if not _same(array, rank[name])]
    return wrong


def _renamed(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if module in OURS:
        return f"{OURS[module]}.{parameter}"
    number, _, short = module.removeprefix("model.layers.").partition(".")
    return f"transformer.layers.{number}.{OURS.get(short, short)}.{parameter}"


def _expected(said: Mapping[str, Any], output: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """config.json's keys with the values that the source's configuration gives them."""
    result = []
    rope = said.get("rope_parameters")
    both = {**said, **rope} if isinstance(rope, dict) else dict(said)
    if "dim" in said:
        both = {key: value for key, value in both.items() if key not in HUGGING_FACES}
    for key, (names, default) in SIZES.items():
        value = next((both[name] for name in names if both.get(name) is not None), default)
        if key == "num_key_value_heads" and value is None:
            value = output["num_attention_heads"]
        if key == "vocab_size" and (value == -1 or "tokenizer.ggml.tokens" in said):
            continue
        result.append((key, float(str(np.float32(value))) if isinstance(value, float) and "block_count" in said else value))
    return result


def _rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers of another type, each rounded once."""
    if array.dtype == dtype:
        return array
    return (array.astype(np.float32) if array.dtype == TYPES["bfloat16"] else array).astype(dtype)


def _same(expected: np.ndarray, found: np.ndarray) -> bool:
    """Whether two arrays have the same bytes, or the same numbers, as which of all NaN it is may depend on who rounds."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if np.ascontiguousarray(expected).tobytes() == found.tobytes():
        return True
    return bool(np.array_equal(expected.astype(np.float32), found.astype(np.float32), equal_nan=True))
