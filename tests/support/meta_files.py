"""Tiny checkpoints in Meta's own format, from the tensors of a Hugging Face checkpoint: names and splits written out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.checkpoints import head_size

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
# What fairscale's column- and row-parallel layers split; the rest each part holds whole.
ROWS = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output")
COLUMNS = ("attention.wo", "feed_forward.w2")


def params(config: Mapping[str, Any]) -> dict[str, Any]:
    """params.json of the same model."""
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
    }


def shares(
    config: Mapping[str, Any], source: Mapping[str, np.ndarray], parts: int = 1, *, vocabulary: bool = False
) -> list[dict[str, np.ndarray]]:
    """The tensors of each part. The embedding is split on the hidden axis, as of Llama 1 and 2, or as of Llama 3 the vocabulary."""
    result: list[dict[str, np.ndarray]] = [{} for _ in range(parts)]
    for name, array in source.items():
        module, _, parameter = name.rpartition(".")
        layer, short = ("", module) if module in NAMES else tuple(module.removeprefix("model.layers.").split(".", 1))
        if short in ("self_attn.q_proj", "self_attn.k_proj"):
            # Rows of the rotary halves alternate: 0, D/2, 1, D/2 + 1, ...
            half = head_size(dict(config)) // 2
            order = [
                2 * half * head + row + side
                for head in range(len(array) // (2 * half))
                for row in range(half)
                for side in (0, half)
            ]
            array = array[order]
        theirs = NAMES[short]
        split = 0 if theirs in ROWS or (theirs == "tok_embeddings" and vocabulary) else 1
        whole = theirs not in (*ROWS, *COLUMNS, "tok_embeddings")
        # A length that the parts do not divide has a longer share first, which headrace takes too.
        pieces = [array] * parts if whole else np.array_split(array, parts, axis=split)
        for part, piece in zip(result, pieces, strict=True):
            part[f"layers.{layer}.{theirs}.{parameter}" if layer else f"{theirs}.{parameter}"] = piece
    return result


def save(directory: Path, values: Mapping[str, Any], parts: list[dict[str, np.ndarray]], *, files: int = 0) -> None:
    """Write params.json and the parts: each a file, or a directory of `files` files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(values))
    for number, part in enumerate(parts):
        path = directory / f"consolidated.{number:02}"
        if not files:
            torch.save({name: tensor(array) for name, array in part.items()}, path.with_name(f"{path.name}.pth"))
            continue
        path.mkdir()
        for n in range(files):
            some = dict(list(part.items())[n::files])
            torch.save({name: tensor(array) for name, array in some.items()}, path / f"consolidated-{n + 1:05}-of-{files:05}.pth")


def tensor(array: np.ndarray) -> torch.Tensor:
    """An array as torch's tensor of the same bits."""
    array = np.array(array, order="C")
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.name == "bfloat16" else torch.from_numpy(array)
    )


def write(
    directory: Path,
    config: Mapping[str, Any],
    source: Mapping[str, np.ndarray],
    parts: int = 1,
    *,
    vocabulary: bool = False,
    files: int = 0,
) -> Path:
    """Save a Hugging Face checkpoint's tensors as Meta would."""
    save(directory, params(config), shares(config, source, parts, vocabulary=vocabulary), files=files)
    return directory
