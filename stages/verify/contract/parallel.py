"""Read config.json's `mapping`: the number of ranks, and the sizes of the parallel axes.

Facts: docs/format/checkpoint.md, sections 1 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from stages.verify.contract.reader import ConfigReader, shown

MOST_RANKS = 1 << 16
# The keys that `Mapping(**dict)` takes in some version from 0.13 to 1.2.1.
KEYS = (
    "world_size",
    "rank",
    "gpus_per_node",
    "cp_size",
    "cp_config",
    "tp_size",
    "pp_size",
    "pp_partition",
    "moe_cluster_size",
    "moe_tp_size",
    "moe_ep_size",
    "attn_tp_size",
    "attn_cp_size",
    "auto_parallel",
    "enable_attention_dp",
    "enable_lm_head_tp_in_adp",
)


@dataclass(frozen=True)
class MappingSizes:
    """The sizes of the parallel axes; `layers`: the number of layers of each pipeline stage."""

    tp: int
    pp: int
    moe_tp: int
    moe_ep: int
    layers: tuple[int, ...]

    def stages(self) -> list[range]:
        """The layers of each stage, by their number in the model."""
        ends = [0, *accumulate(self.layers)]
        return [range(first, last) for first, last in pairwise(ends)]


def read_mapping(mapping: Mapping[str, Any], layers: int, experts: bool) -> tuple[MappingSizes, ConfigReader]:
    """Read the sizes; the reader holds what is wrong: what `Mapping`'s own checks refuse, and sizes that no shapes follow from.

    `layers`: of the model. `experts`: whether it has some.
    """
    reader = ConfigReader(mapping, "mapping.")
    reader.check_keys(KEYS)
    world, tp, pp = (reader.size(key, most=MOST_RANKS) for key in ("world_size", "tp_size", "pp_size"))
    cp = reader.size("cp_size", most=MOST_RANKS, default=1)
    reader.size("gpus_per_node", default=8)
    reader.size("rank", least=0, default=0)
    if tp * pp * cp != world:
        found = f"{world}, where tp_size {tp} x pp_size {pp} x cp_size {cp} is {tp * pp * cp}"
        reader.wrong("world_size", "the product of the three", found=found, fatal=tp * pp > MOST_RANKS)
    moe_tp, moe_ep = _experts(reader, tp)
    if experts and cp > 1:
        reader.wrong("cp_size", "1: TensorRT-LLM has no context parallelism for experts")
    if (attention := _size_or_default(reader, "attn_tp_size")) not in (-1, tp * cp):
        reader.wrong("attn_tp_size", f"-1 or {tp * cp}", found=str(attention))
    if _size_or_default(reader, "attn_cp_size") not in (-1, 1):
        reader.wrong("attn_cp_size", "-1 or 1")
    for key in ("auto_parallel", "enable_attention_dp", "enable_lm_head_tp_in_adp"):
        if reader.flag(key):
            reader.wrong(key, "false: weights would be split otherwise")
    if reader.has("cp_config") and not isinstance(mapping["cp_config"], Mapping):
        reader.wrong("cp_config", "an object, or null")
    return MappingSizes(tp, pp, moe_tp, moe_ep, _stages(reader, pp, layers)), reader


def _size_or_default(reader: ConfigReader, key: str) -> int:
    """A size of 1 or more, or -1 for the default."""
    value = reader.size(key, least=-1, most=MOST_RANKS, default=-1)
    if value == 0:
        reader.wrong(key, "-1, or 1 and more", fatal=True)
        return 1
    return value


def _experts(reader: ConfigReader, tp: int) -> tuple[int, int]:
    """(moe_tp_size, moe_ep_size), with defaults as the loader fills them in."""
    if _size_or_default(reader, "moe_cluster_size") not in (-1, 1):
        reader.wrong("moe_cluster_size", "-1 or 1: clusters of experts split other weights")
    moe_tp, moe_ep = _size_or_default(reader, "moe_tp_size"), _size_or_default(reader, "moe_ep_size")
    if moe_ep == -1:
        moe_ep = max(tp // moe_tp, 1) if moe_tp != -1 else 1
    if moe_tp == -1:
        moe_tp = max(tp // moe_ep, 1)
    if moe_tp * moe_ep != tp:
        found = f"{moe_tp}, with moe_ep_size {moe_ep}"
        reader.wrong("moe_tp_size", f"sizes whose product is tp_size {tp}", found=found, fatal=True)
    return moe_tp, moe_ep


def _stages(reader: ConfigReader, pp: int, layers: int) -> tuple[int, ...]:
    """The layers of each stage: the first `layers % pp` have one more, unless `pp_partition` says otherwise."""
    if reader.has("pp_partition"):
        partition = reader.values["pp_partition"]
        whole = isinstance(partition, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in partition)
        if whole and len(partition) == pp and sum(partition) == layers:
            return tuple(partition)
        reader.wrong("pp_partition", f"{pp} counts of layers whose sum is {layers}, or null", found=shown(partition), fatal=True)
    if pp > layers:
        reader.wrong("pp_size", f"at most num_hidden_layers {layers}", fatal=True)
    size, extra = divmod(layers, pp)
    return tuple(size + (stage < extra) for stage in range(pp))
