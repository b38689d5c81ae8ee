"""How config.json says that a model is split over ranks: the sizes of the parallel axes and of what they share out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.verify.contract.class_values import number_of_experts
from stages.verify.contract.parallel import MappingSizes, read_mapping

Span = tuple[int, int]  # from the first to behind the last


@dataclass(frozen=True)
class ModelSplit(MappingSizes):
    """The sizes by which a model is split, beside those of the parallel axes.

    `heads`, `kv_heads`, `vocab` and `experts`: of the whole model. `head_size`: features of a head.
    """

    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    experts: int

    def rank_of(self, stage: int, tp_rank: int) -> int:
        """The rank that is number `tp_rank` of a pipeline stage."""
        return stage * self.tp + tp_rank


def model_split(config: Mapping[str, Any]) -> ModelSplit:
    """Read the sizes from a config.json that the contract takes. Raises KeyError where one is missing."""
    heads, experts = config["num_attention_heads"], number_of_experts(config)
    parallel, _ = read_mapping(config["mapping"], config["num_hidden_layers"], experts > 0)
    head_size = config.get("head_size") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return ModelSplit(
        **vars(parallel), heads=heads, kv_heads=kv_heads, head_size=head_size, vocab=config["vocab_size"], experts=experts
    )


def split(length: int, count: int, index: int) -> Span:
    """The index-th of `count` equal parts of `length`, as (start, stop)."""
    return length * index // count, length * (index + 1) // count
