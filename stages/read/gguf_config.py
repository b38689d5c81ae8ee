"""A GGUF file's metadata as a model's configuration: keys without the architecture's prefix, and what GGUF keeps elsewhere.

Source: llama.cpp's converter (`conversion/`), which writes the keys and tensors, and its loader (`src/models/`), which reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
READ = (FREQUENCIES, SHORT, LONG)  # the tensors whose values the configuration needs
# Keys of yarn: llama.cpp's, less `rope.scaling.`, and config.json's.
YARN = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Keys of yarn that only some of llama.cpp's models compute, with the value that changes nothing.
YARN_OFF = {"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}


def gguf_config(
    metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, LazyTensor], location: Path
) -> dict[str, Any]:
    """Return a model's configuration: its architecture's keys without their prefix, and further ones for what GGUF keeps elsewhere.

    Further keys: `vocab_size`, `attention.bias`, `rope_scaling` (an object as in config.json; absent for none) and `rope.share`,
    the share of a head that is turned. Reads the small tensors of rotary factors. Raises BadInput naming a scaling that cannot be
    said.
    """
    prefix = f"{architecture}."
    config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "tokenizer.ggml.tokens" in metadata:
        tokens = metadata["tokenizer.ggml.tokens"]
        # The reader gives a long array's length in its place.
        config.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else tokens)
    config["attention.bias"] = "blk.0.attn_q.bias" in tensors
    if share := _share(config):
        config["rope.share"] = share
    if scaling := _rope_scaling(config, tensors, location):
        config["rope_scaling"] = scaling
    return config


def _share(config: Mapping[str, Any]) -> float | None:
    """The share of a head that is turned; None where the file does not say it in numbers."""
    names = ("rope.dimension_count", "embedding_length", "attention.head_count")
    turned, hidden, heads = (config.get(name) for name in names)
    size = config.get("attention.key_length", hidden // heads if _is_size(hidden) and _is_size(heads) else None)
    return turned / size if _is_size(turned) and _is_size(size) else None


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _rope_scaling(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], location: Path) -> dict[str, Any] | None:
    """Return the scaling of rotary positions as config.json would have it; None where there is none.

    GGUF has it as metadata (linear, yarn), as a tensor of frequency factors (Llama 3.1), whose parameters are recovered from the
    factors and checked against every one, or as two tensors of factors (long rope). Raises BadInput for any other kind of scaling.
    """
    if FREQUENCIES in tensors:
        return _llama3(config, tensors[FREQUENCIES], location)
    if SHORT in tensors or LONG in tensors:
        return _long_rope(config, tensors, location)
    kind = config.get("rope.scaling.type", "none")
    factor = config.get("rope.scaling.factor")
    if kind == "none":
        return None
    if kind in ("linear", "yarn") and _is_number(factor):
        scaling = {"rope_type": kind, "factor": float(factor)}
        return scaling if kind == "linear" else {**scaling, **_yarn(config, location)}
    expected = "none, linear or yarn with a factor, Llama 3.1's factors, or those of a long rope"
    raise BadInput([Problem(f"{location}: rope.scaling.type", str(kind), expected)])


def _yarn(config: Mapping[str, Any], location: Path) -> dict[str, Any]:
    problems = []
    for name, plain in YARN_OFF.items():
        value = config.get(f"rope.scaling.{name}", plain)
        if value != plain:
            problems.append(Problem(f"{location}: rope.scaling.{name}", repr(value), f"{plain:g}: TensorRT-LLM computes no other"))
    if problems:
        raise BadInput(problems)
    found = {ours: config.get(f"rope.scaling.{theirs}") for theirs, ours in YARN.items()}
    return {name: value for name, value in found.items() if value is not None}


def _long_rope(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], location: Path) -> dict[str, Any]:
    """Phi-3's two lists of factors. The factor of rotated values is left out where it is the one that the lengths give."""
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for key, name in (("short_factor", SHORT), ("long_factor", LONG)):
        if name not in tensors:
            raise BadInput([Problem(f"{location}: {name}", "no such tensor", "factors for short positions and for long ones")])
        stored = _values(tensors[name]).astype(np.float32)
        if stored.ndim != 1 or not np.all(np.isfinite(stored)) or not np.all(stored > 0):
            found, expected = f"{stored.size} factors of shape {list(stored.shape)}", "one axis of factors greater than 0"
            raise BadInput([Problem(f"{location}: {name}", found, expected)])
        scaling[key] = [float(str(each)) for each in stored]  # the numbers that were meant
    trained, longest = config.get("rope.scaling.original_context_length"), config.get("context_length")
    if not _is_size(trained) or not _is_size(longest):
        key = "context_length" if _is_size(trained) else "rope.scaling.original_context_length"
        raise BadInput([Problem(f"{location}: {key}", repr(config.get(key)), "the number of positions that the factors go with")])
    scaling["original_max_position_embeddings"] = trained
    declared = config.get("rope.scaling.attn_factor")
    meant = math.sqrt(1 + math.log(longest / trained) / math.log(trained)) if longest > trained > 1 else 1.0
    if _is_number(declared) and not math.isclose(declared, meant, rel_tol=1e-5):
        scaling["attention_factor"] = declared
    return scaling


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(tensor: LazyTensor) -> np.ndarray:
    return np.asarray(tensor.block(tuple((0, n) for n in tensor.shape)))


def _llama3(config: Mapping[str, Any], factors: LazyTensor, location: Path) -> dict[str, Any]:
    stored = _values(factors).astype(np.float64)
    if stored.ndim != 1 or not stored.size or not np.all(np.isfinite(stored)) or stored.min() < 1:
        found, expected = f"{stored.size} factors of shape {list(stored.shape)}", "one axis of factors of 1 or more"
        raise BadInput([Problem(f"{location}: {FREQUENCIES}", found, expected)])
    base = config.get("rope.freq_base", 10000.0)
    if not _is_number(base) or not base > 0:
        raise BadInput([Problem(f"{location}: rope.freq_base", repr(base), "a number greater than 0")])
    scaling = {
        "factor": float(round(float(stored.max()), 3)),
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    if not np.allclose(stored, llama3_factors(float(base), 2 * stored.size, scaling), rtol=1e-3):
        expected = "the factors of a llama3 scaling with bands 1 to 4 of 8192 positions"
        raise BadInput([Problem(f"{location}: {FREQUENCIES}", f"factors {stored.min():g} to {stored.max():g}", expected)])
    return scaling


def llama3_factors(base: float, head_size: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return the factors by which Llama 3.1 divides the rotary frequencies: float64 [head_size / 2]."""
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_size, 2) / head_size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    factors: np.ndarray = 1 / (np.clip(smooth, 0, 1) * (1 - 1 / scaling["factor"]) + 1 / scaling["factor"])
    return factors
