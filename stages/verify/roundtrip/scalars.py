"""What no weight is made of: scales of activations and of the cache, and bounds. Each is the source's own, or what the format says.

Facts: quantized layouts, sections 4e, 7 and 8. A rank's `activation_scaling_factor` is the largest of those of its source modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.errors import Problem
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.origin import Piece
from stages.verify.values import read

SCALES = ("weights_scaling_factor", "per_channel_scale", "prequant_scaling_factor", "activation_scaling_factor")
CACHE = "kv_cache_scaling_factor"


def check_scalars(checkpoint: Checkpoint, pieces: Iterable[Piece], source: Mapping[str, LazyTensor]) -> Iterator[Problem]:
    """Compare every scale that is not of a weight. `source`: the tensors of the source as its files name them."""
    modules: dict[tuple[int, str], dict[str, None]] = defaultdict(dict)
    for piece in pieces:
        modules[piece.rank, piece.module][piece.source.rpartition(".")[0]] = None
    for number, rank in enumerate(checkpoint.ranks):
        for name, tensor in rank.items():
            module, _, parameter = name.rpartition(".")
            if parameter == "clamp_val":
                wanted = _bounds(checkpoint)
            elif parameter == "activation_scaling_factor":
                wanted = _largest(source, [f"{each}.input_scale" for each in modules[number, module]])
            elif parameter == CACHE:
                wanted = _cache(source, list(modules[number, f"{module}.qkv"]))
            elif parameter in SCALES:
                wanted = None
            else:
                continue
            values = read(tensor).float()
            subject = f"rank{number}.safetensors: {name}"
            if not bool(torch.isfinite(values).all()) or (parameter != "clamp_val" and bool((values < 0).any())):
                yield Problem(subject, "a value that is negative or not finite", "scales of 0 or more")
            elif wanted is not None and not torch.equal(values, wanted):
                yield Problem(subject, str(values.tolist()), f"{wanted.tolist()}, by the source")


def _bounds(checkpoint: Checkpoint) -> Tensor | None:
    bounds = checkpoint.config.get("quantization", {}).get("clamp_val")
    return torch.tensor(bounds, dtype=torch.float32) if bounds else None


def _largest(source: Mapping[str, LazyTensor], names: Iterable[str]) -> Tensor | None:
    held = [read(source[name]).float().reshape(-1) for name in names if name in source]
    return torch.cat(held).max().reshape(1) if held else None


def _cache(source: Mapping[str, LazyTensor], modules: Iterable[str]) -> Tensor:
    """The larger of the keys' and the values' scales; 1 where the source has not both."""
    names = [f"{module}.{module[-6]}_scale" for module in modules if module.endswith(("k_proj", "v_proj"))]
    found = _largest(source, names) if all(name in source for name in names) and names else None
    return torch.ones(1) if found is None else found
