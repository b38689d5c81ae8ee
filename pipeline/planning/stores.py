"""The stores of a plan's last phase: which arrays of which targets are made of one tensor, and what their work needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.planning.memory import DENSE_COPIES, PACKED_COPIES, Need
from pipeline.planning.phases import Store
from pipeline.tensor.placement import NOWHERE, JoinedPlacements

if TYPE_CHECKING:
    from pipeline.planning.compose import TargetTensors
    from pipeline.planning.opening import OpenedSource
    from pipeline.tensor.arrays import BlockArray
    from pipeline.tensor.names import TensorName
    from pipeline.tensor.placement import Placements
    from pipeline.tensor.tensors import TensorMap
    from stages.rename import Matches
    from stages.shard import Sharding


def make_stores(tensors: TensorMap, targets: Sequence[TargetTensors], opened: OpenedSource, again: bool) -> tuple[Store, ...]:
    """One store for each array, in the order of the source's bytes; names that share an array (ties) share the store.

    `again`: the arrays are read from scratch, not from the source.
    """
    source, matches = opened.source.named, opened.matches
    first: dict[tuple[BlockArray | None, ...], TensorName] = {}
    ties: dict[TensorName, list[TensorName]] = {}  # by the first name of their array
    for name in dict.fromkeys(name for target in targets for name in target.arrays):
        other = first.setdefault(tuple(target.arrays.get(name) for target in targets), name)
        if other is not name:
            ties.setdefault(other, [other]).append(name)
    stores, order = [], []
    for name in first.values():
        shared = ties.get(name, (name,))
        tensor = source.get(matches.origin(name))
        place = (str(getattr(tensor, "path", "~")), getattr(tensor, "offset", 0))
        period = _row_multiple(name, matches, targets[0].sharding)
        # Targets of different algorithms make different arrays of one tensor; those of one shape share the work.
        for some in {target.arrays[name].chunks: target.arrays[name] for target in targets if name in target.arrays}.values():
            alike = [name in target.arrays and target.arrays[name].chunks == some.chunks for target in targets]
            arrays = tuple([target.arrays[name] if fits else some for target, fits in zip(targets, alike, strict=True)])
            placements = tuple([_placed(target, shared) if fits else NOWHERE for target, fits in zip(targets, alike, strict=True)])
            before = tensors.get(name, some)
            nbytes = 0 if tensor is None else int(before.nbytes) if again else matches.source_bytes(name, source)
            working = [target.entries[name].parameter.working_bytes for target in targets if name in target.entries]
            itemsize = max(0, *working, *(array.dtype.itemsize for array in (before, *arrays)))
            stores.append(Store(name, arrays, placements, itemsize, period, nbytes))
            order.append(place)
    return tuple([stores[n] for n in sorted(range(len(stores)), key=order.__getitem__)])


def _placed(target: TargetTensors, names: Sequence[TensorName]) -> Placements:
    """Where the regions of an array of these names go."""
    return target.placements(names[0]) if len(names) == 1 else JoinedPlacements(map(target.placements, names))


def _row_multiple(name: TensorName, matches: Matches, sharding: Sharding) -> int:
    found = matches.find(name)
    return sharding.model.dimension(found.row.period) if found and found.row.period else 1


def need(store: Store, whole_chunks: bool, ahead: int = 0) -> Need:
    """The memory that a store's smallest piece takes; a whole chunk, where `whole_chunks` says that it is moved as one.

    `ahead`: how many pieces of the source are in memory beside those, as they are fetched ahead.
    """
    array = store.arrays[0]
    if whole_chunks:
        # On object storage a chunk is put and fetched whole.
        return Need(store.name, math.prod(array.chunksize) * store.itemsize, PACKED_COPIES + ahead)
    packed = store.itemsize * array.size > 2 * store.source_bytes
    row = int(array.shape[-1]) if math.prod(array.shape[:-1]) > 1 else 1
    copies = ahead + (PACKED_COPIES if packed else DENSE_COPIES)
    return Need(store.name, row * store.itemsize * store.row_multiple, copies)
