"""The bytes that each rank file of a run gets, by the name that its output is shown by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.tensor.placement import size

if TYPE_CHECKING:
    from pipeline.planning.plans import Plan


def rank_sizes(plan: Plan, sinks: Sequence[int]) -> list[tuple[tuple[int, int], str, int]]:
    """Return ((position of the sink, rank), name of the output, bytes to write) of each rank.

    `sinks`: the indices of the outputs that are written, among the sinks of the plan's last phase.
    """
    phase = plan.phases[-1]
    totals: dict[tuple[int, int], int] = {}
    for store in phase.stores:
        for place, sink in enumerate(sinks):
            itemsize = store.arrays[sink].dtype.itemsize
            for placement in store.placed(sink):
                if placement.source is not None:
                    key = place, placement.rank
                    totals[key] = totals.get(key, 0) + size(placement.target) * itemsize
    shown = shown_names(plan, sinks)
    return [(key, shown[sinks[key[0]]], total) for key, total in sorted(totals.items())]


def shown_names(plan: Plan, sinks: Sequence[int]) -> dict[int, str]:
    """Return the name that each output is shown by: its directory's, or the whole path where two have the same."""
    directories = {sink: plan.phases[-1].sinks[sink].directory for sink in sinks}
    names = {sink: directory.name for sink, directory in directories.items()}
    return names if len(set(names.values())) == len(names) else {sink: str(path) for sink, path in directories.items()}
