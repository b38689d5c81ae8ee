"""Phase, Store, Sink: the work of a plan, as tensors that go to sinks in groups of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import xxhash

from pipeline.planning.memory import Budget
from pipeline.sinks.journal import Journal
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.noted import NotedArray
from pipeline.tensor.placement import Located, Placement, Placements, Region, size
from pipeline.tensor.reduced import ReducedArray
from stages.write.parts import RankPart


class Sink(Protocol):
    """Where a phase's tensors go: an output directory or a scratch group."""

    @property
    def complete(self) -> bool: ...
    @property
    def directory(self) -> Path: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...
    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]: ...
    def begin(self, tasks: str, fresh: bool) -> Journal: ...
    def begun(self, tasks: str) -> list[dict[str, Any]]: ...
    def vouched(self, entries: Iterable[Mapping[str, Any]]) -> set[str]: ...
    def abandon(self, journal: Journal, created: Path | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Store:
    """One tensor on its way through a phase.

    `arrays[s]` is its array as sink s wants it, `placements[s]` where its regions go there (for tied embeddings, to two tensors),
    which is worked out when it is asked for. `itemsize` is that of the widest form its values take on the way; rows are cut at
    multiples of `row_multiple`.
    """

    label: object
    arrays: tuple[BlockArray, ...]
    placements: tuple[Placements, ...]
    itemsize: int
    row_multiple: int
    source_bytes: int

    @property
    def name(self) -> str:
        return str(self.label)

    def block_bytes(self, index: Sequence[int]) -> int:
        """The bytes of the source that the block at a chunk index stands for."""
        return self.share_bytes(self.block_elements(index))

    def block_elements(self, index: Sequence[int]) -> int:
        """The number of elements of the block at a chunk index."""
        return size(self.region(index))

    def share_bytes(self, elements: int) -> int:
        """The bytes of the source that some of its elements stand for."""
        return int(self.source_bytes * elements // max(self.arrays[0].size, 1))

    def region(self, index: Sequence[int]) -> Region:
        """The region of the tensor that the block at a chunk index covers."""
        return self.arrays[0].grid.regions[tuple(index)]

    def placed(self, sink: int) -> Iterator[Placement]:
        """Where its regions go in a sink."""
        return iter(self.placements[sink])

    def written_bytes(self, sink: int) -> int:
        """The bytes that tasks write to a sink; padding is reserved, not written."""
        return self.placements[sink].elements * self.arrays[sink].dtype.itemsize


Group = tuple[tuple[Store, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Phase:
    """Stores that can run in any order, and the groups of their blocks. Those of a later phase read the chunks that it writes.

    `passes`: the stages that each of its groups passes, whether or not they do anything there. `here`: its tasks run in this
    process, whatever the scheduler, as they read what is in its memory. `parts`: of a group that assembles one, by its position.
    """

    name: str
    stores: tuple[Store, ...]
    sinks: tuple[Sink, ...]
    groups: tuple[Group, ...] = field(repr=False)
    passes: tuple[str, ...] = ()
    here: bool = False
    parts: Mapping[int, RankPart] = field(default_factory=dict, repr=False)

    @cached_property
    def tasks(self) -> str:
        """Names the tasks in journals: their number, and which blocks, or which part of a file, each has.

        As many may be cut at other places. What a part is made of decides nothing: it may come from scratch or from the source.
        """
        digest = xxhash.xxh3_64()
        for store in () if self.parts else self.stores:
            digest.update(f"{store.name} {store.arrays[0].chunks}\n".encode())
        for number, group in enumerate(self.groups):
            if part := self.parts.get(number):
                digest.update(f"{part.sink} {part.rank} {part.number} {part.start} {part.end}\n".encode())
            elif group:
                digest.update(f"{group[0][0].name} {group[0][1]} {len(group)}\n".encode())
        return f"{len(self.groups)} {digest.hexdigest()}"

    @property
    def pending(self) -> tuple[int, ...]:
        """The numbers of the sinks that are not whole yet."""
        return tuple(number for number, sink in enumerate(self.sinks) if not sink.complete)

    def written_bytes(self, sinks: Sequence[int]) -> int:
        """The bytes that tasks write to some of the sinks."""
        return sum(store.written_bytes(sink) for store in self.stores for sink in sinks)


def group_blocks(stores: Sequence[Store], block_bytes: int) -> tuple[Group, ...]:
    """The tasks: blocks (store, chunk index) that together are about `block_bytes` of the source, in its order.

    What is noted while a block is made follows it in its task, and all that takes one reduced array is of one task.
    """
    groups: list[Group] = []
    group: list[tuple[Store, tuple[int, ...]]] = []
    filled = 0
    noted, reduced = _noted(stores), _of_reduced(stores)
    behind = {id(store) for by_first in (noted, reduced) for stores_of in by_first.values() for store in stores_of}
    for store in stores:
        if id(store) in behind:
            continue
        together = (store, *reduced[id(store)]) if id(store) in reduced else ()
        pieces = [together] if together else [()] * store.arrays[0].npartitions
        for each, index in zip(pieces, store.arrays[0].grid.regions, strict=False):
            blocks = [(one, at) for one in each for at in one.arrays[0].grid.regions] or [(store, index)]
            nbytes = sum(one.block_bytes(at) for one, at in blocks)
            if group and filled + nbytes > block_bytes:
                groups.append(tuple(group))
                group, filled = [], 0
            group += [(both, at) for one, at in blocks for both in (one, *noted.get(id(one), ()))]
            filled += nbytes
    return (*groups, tuple(group)) if group else tuple(groups)


def _noted(stores: Sequence[Store]) -> dict[int, list[Store]]:
    """The stores of numbers that are noted while the blocks of another store are made, by the id of that."""
    makers = {id(array): store for store in stores for array in store.arrays}
    result: dict[int, list[Store]] = {}
    for store in stores:
        values = [id(array.of) for array in store.arrays if isinstance(array, NotedArray)]
        maker = next((makers[each] for each in values if each in makers), None)
        if maker:
            result.setdefault(id(maker), []).append(store)
    return result


def _of_reduced(stores: Sequence[Store]) -> dict[int, list[Store]]:
    """The stores that take reduced arrays which another one takes before them, by the id of that."""
    first: dict[BlockArray, Store] = {}
    result: dict[int, list[Store]] = {}
    for store in stores:
        takes = {each for array in store.arrays for each in array.inputs if isinstance(each, ReducedArray)}
        leader = next((first[each] for each in takes if each in first), store)
        for each in takes:
            first.setdefault(each, leader)
        if takes:
            result.setdefault(id(leader), []).extend([] if leader is store else [store])
    return result


class Phased(Protocol):
    """The part of a plan that says what goes through which stages: what its graphs are made of."""

    @property
    def phases(self) -> tuple[Phase, ...]: ...
    @property
    def budget(self) -> Budget: ...
    def first_group(self, phase: int) -> int: ...
