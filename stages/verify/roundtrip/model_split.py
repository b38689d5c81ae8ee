"""How config.json says that a model is split over ranks: the sizes of the parallel axes and of what they share out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]  # from the first to behind the last


@dataclass(frozen=True)
class ModelSplit:
    """The sizes by which a model is split.

    `tp`, `pp`, `ep`: tensor-parallel ranks of a stage, pipeline stages, blocks of experts. `layers`, `heads`, `kv_heads` and
    `vocab`: of the whole model. `head_size`: features of a head.
    """

    tp: int
    pp: int
    ep: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    def rank_of(self, stage: int, tp_rank: int) -> int:
        """The rank that is number `tp_rank` of a pipeline stage."""
        return stage * self.tp + tp_rank

    def stages(self) -> list[range]:
        """Each stage's layers by their number in the model: the first stages have one more where they do not divide."""
        share, more = divmod(self.layers, self.pp)
        starts = [n * share + min(n, more) for n in range(self.pp + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]


def model_split(config: Mapping[str, Any]) -> ModelSplit:
    """Read the sizes from a config.json. Raises KeyError where one is missing."""
    mapping, heads = config["mapping"], config["num_attention_heads"]
    tp = mapping.get("tp_size", 1)
    head_size = config.get("head_size") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    sizes = (config["num_hidden_layers"], heads, kv_heads, head_size, config["vocab_size"])
    return ModelSplit(tp, mapping.get("pp_size", 1), mapping.get("moe_ep_size", 1), *sizes)


def split(length: int, count: int, index: int) -> Span:
    """The index-th of `count` equal parts of `length`, as (start, stop)."""
    return length * index // count, length * (index + 1) // count
