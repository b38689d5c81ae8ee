"""A float model, what a format makes of it, and how that is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import checkpoints

Arrays = dict[str, np.ndarray]
BF16, FP8, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float16)

# Every axis of every rank is a multiple of 64 at tp_size 1, 2 and 4; at 4 two ranks share a kv head.
LLAMA: dict[str, Any] = {
    **checkpoints.LLAMA,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mlp_bias": False,
    "attention_bias": False,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
PLACES = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
LINEAR = ("qkv_proj", "gate_up_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
LINEAR += ("W_pack", "c_attn", "c_proj")


@dataclass(frozen=True)
class Packed:
    """What a format stores of one module, by local name, and the float32 weight [out, in] that it stands for."""

    parameters: Arrays
    weight: np.ndarray


Quantizer = Callable[[str, np.ndarray], Packed]


@dataclass(frozen=True)
class Format:
    """A way to quantize a checkpoint.

    `quantizer(module, weight)` packs a module; `settings` is config.json's quantization_config, `files` are JSON files beside it.
    `algorithm` is what TensorRT-LLM calls it, "" where it has no kernel for it; `flags` are options that it needs there. `zero`:
    groups have zero points, as far as a target is concerned.
    """

    quantizer: Quantizer
    settings: dict[str, Any]
    algorithm: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    skip: Callable[[str, int], bool] = lambda module, layers: False  # noqa: ARG005
    zero: bool = True


def linear(name: str) -> bool:
    """Whether a tensor is the weight of a layer's linear module."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR


def values(config: dict[str, Any], seed: int = 0) -> Arrays:
    """A float model of the configuration: weights about as large as those of trained models, a little off centre."""
    random = np.random.default_rng(seed)
    result = {}
    for name, array in checkpoints.values(config, seed).items():
        wide = array.astype(np.float32)
        if array.ndim == 2:
            wide = wide * 0.05 + random.normal(0, 0.02, (len(array), 1))
        result[name] = wide.astype(array.dtype)
    return result


def write(directory: Path, config: dict[str, Any], kind: Format, *, tensors: Arrays | None = None, shards: int = 1) -> Arrays:
    """Save a quantized checkpoint of a float model; returns the tensors that it stands for, quantized ones as float32."""
    tensors = values(config) if tensors is None else tensors
    stored, stands_for = quantized(tensors, kind, config["num_hidden_layers"])
    checkpoints.save(directory, described(config, kind), stored, shards=shards)
    for name, content in kind.files.items():
        (directory / name).write_text(json.dumps(content))
    return stands_for


def quantized(tensors: Arrays, kind: Format, layers: int) -> tuple[Arrays, Arrays]:
    """The tensors of a float model as a format stores them, and what they stand for."""
    stored: Arrays = {}
    stands_for: Arrays = {}
    for name, array in tensors.items():
        module = name.removesuffix(".weight")
        if not linear(name) or kind.skip(module, layers):
            stored[name] = stands_for[name] = array
            continue
        packed = kind.quantizer(module, array.astype(np.float32))
        stored |= {f"{module}.{key}": np.ascontiguousarray(value) for key, value in packed.parameters.items()}
        stands_for[name] = packed.weight
    return stored, stands_for


def described(config: dict[str, Any], kind: Format) -> dict[str, Any]:
    """config.json with what the quantizer says."""
    return {**config, "quantization_config": kind.settings} if kind.settings else config


def write_float(directory: Path, config: dict[str, Any], tensors: Arrays) -> None:
    """Save the float model that a quantized checkpoint stands for, its quantized tensors as float32."""
    checkpoints.save(directory, config, {name: np.ascontiguousarray(array) for name, array in tensors.items()})
