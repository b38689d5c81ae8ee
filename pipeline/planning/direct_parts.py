"""Whether the parts of rank files can be made of the source at once, without a cut after `shard`.

A part has some rows of some tensors. Where values are the source's own, moved, cast, or changed by rows, those rows alone are read.
What is packed or quantized goes through the cut: parts would share its blocks, and make them again each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.tensor.bucket import in_parts
from pipeline.tensor.placement import ends
from pipeline.tensor.units import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.planning.phases import Store
    from pipeline.tensor.arrays import BlockArray

PLAIN_STAGES = ("read", "rename", "cast")
MOST_READ = 1.25  # of the bytes of a source behind a URL, where nothing keeps what one part has read for the next


def needs_cut(stores: Sequence[Store], directories: Sequence[Path], fetched: bool) -> str:
    """Why outputs in object storage need a cut after `shard`; "" where parts can be made of the source at once.

    `stores`: those of the plan's last phase, as they are without that cut. `directories`: of the outputs.
    `fetched`: the source is behind a URL.
    """
    if len(directories) > 1:
        return "several outputs share one reading"
    if not in_parts(str(directories[0])):
        return "this store takes each file as one stream"
    for store in stores:
        reason = _not_plain(store.arrays[0])
        if reason:
            return f"{store.name} {reason}"
    if not fetched:
        return ""  # a rank's columns are pages that the other ranks' parts, which are made beside it, have brought to memory
    total, taken = sum(store.source_bytes for store in stores), sum(map(_fetched_bytes, stores))
    if taken > total * MOST_READ:
        return f"parts made at once would fetch {human_bytes(taken)} of a source of {human_bytes(total)}"
    return ""


def _not_plain(array: BlockArray) -> str:
    """Why some rows of an array cannot be made of a few rows of the source's files; "" where they can."""
    if array.stage not in PLAIN_STAGES:
        return f"passes {array.stage}"
    if not array.by_rows:
        return "is made of several tensors" if array.inputs else "is no one run of bytes in a file"
    return next(filter(None, map(_not_plain, array.inputs)), "")


def _fetched_bytes(store: Store) -> int:
    """The bytes of the source from the first to the last that each placement takes, as columns are fetched with their rows."""
    shape = store.arrays[0].shape
    spans = (ends(shape, placement.source) for placement in store.placed(0) if placement.source is not None)
    return sum(store.share_bytes(last - first) for first, last in spans)
