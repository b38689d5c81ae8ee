"""Outputs that a converter's own mistake has made wrong: their checksums are right."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def damaged(
    ranks: Path, to: Path, change: Callable[[Tensors], None] | None = None, config: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """A copy of an output, with `change` made to the tensors of each rank and `config` to config.json; returns `to`."""
    shutil.copytree(ranks, to)
    if change:
        for path in sorted(to.glob("rank*.safetensors")):
            tensors = load_file(path)
            change(tensors)
            save_file({name: values.contiguous() for name, values in tensors.items()}, path)
    if config:
        held = json.loads((to / "config.json").read_text())
        config(held)
        (to / "config.json").write_text(json.dumps(held, indent=4))
    summed(to)
    return to


def summed(directory: Path) -> None:
    """Give an output the checksums of what it holds."""
    sums: dict[str, Any] = {}
    for path in sorted(directory.glob("rank*.safetensors")):
        bytes_ = {name: values.contiguous().view(-1).view(torch.uint8).numpy() for name, values in load_file(path).items()}
        sums[path.name] = {name: [[data.nbytes, xxhash.xxh3_64_hexdigest(data.data)]] for name, data in bytes_.items()}
    said = json.loads((directory / "headrace.json").read_text())
    digest = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    (directory / "headrace.json").write_text(json.dumps({**said, "xxh3": sums, "config_sha256": digest}))
