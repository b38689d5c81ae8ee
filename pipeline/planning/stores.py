"""The stores of a plan's last phase: which arrays of which targets are made of one tensor, and what their work needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.planning.memory import DENSE_COPIES, PACKED_COPIES, Need
from pipeline.planning.plans import Store
from pipeline.tensor.tensors import Source, TensorMap

if TYPE_CHECKING:
    from pipeline.planning.make_plan import Piece
    from stages.rename import Matches
    from stages.shard import Sharding


def make_stores(tensors: TensorMap, pieces: Sequence[Piece], source: Source, matches: Matches, again: bool) -> tuple[Store, ...]:
    """One store for each array, in the order of the source's bytes; names that share an array (ties) share the store.

    `again`: the arrays are read from scratch, not from the source.
    """
    names: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for piece in pieces for name in piece.arrays):
        key = tuple(piece.arrays[name].name if name in piece.arrays else "" for piece in pieces)
        names.setdefault(key, []).append(name)
    stores = []
    for shared in names.values():
        name = shared[0]
        tensor = source.tensors.get(matches.origin(name))
        order = (str(getattr(tensor, "path", "~")), getattr(tensor, "offset", 0))
        period = _row_multiple(name, matches, pieces[0].sharding)
        # Targets of different algorithms make different arrays of one tensor; those of one shape share the work.
        for some in {piece.arrays[name].chunks: piece.arrays[name] for piece in pieces if name in piece.arrays}.values():
            alike = [name in piece.arrays and piece.arrays[name].chunks == some.chunks for piece in pieces]
            arrays = tuple(piece.arrays[name] if fits else some for piece, fits in zip(pieces, alike, strict=True))
            placements = tuple(
                tuple(p for each in shared for p in piece.placements.get(each, ())) if fits else ()
                for piece, fits in zip(pieces, alike, strict=True)
            )
            before = tensors.get(name, some)
            nbytes = 0 if tensor is None else int(before.nbytes) if again else matches.source_bytes(name, source.tensors)
            working = [piece.entries[name].parameter.working_bytes for piece in pieces if name in piece.entries]
            itemsize = max(0, *working, *(array.dtype.itemsize for array in (before, *arrays)))
            stores.append((order, Store(name, arrays, placements, itemsize, period, nbytes)))
    return tuple(store for _, store in sorted(stores, key=lambda item: item[0]))


def _row_multiple(name: str, matches: Matches, sharding: Sharding) -> int:
    found = matches.find(name)
    return sharding.model.dimension(found.row.period) if found and found.row.period else 1


def need(store: Store, whole_chunks: bool) -> Need:
    """What a store's smallest piece takes of memory; of a whole chunk, where `whole_chunks` says that it is moved as one."""
    array = store.arrays[0]
    if whole_chunks:
        # On object storage a chunk is put and fetched whole.
        return Need(store.name, math.prod(array.chunksize) * store.itemsize, PACKED_COPIES)
    packed = store.itemsize * array.size > 2 * store.source_bytes
    row = int(array.shape[-1]) if math.prod(array.shape[:-1]) > 1 else 1
    return Need(store.name, row * store.itemsize * store.row_multiple, PACKED_COPIES if packed else DENSE_COPIES)
