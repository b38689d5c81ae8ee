"""Arrays of blocks: what the stages pass on, and the small tasks that make their blocks.

A `BlockArray` says of itself what a Dask array does, its name, chunks and dtype, and knows how a block is made. The tasks are made
when they are asked for: for a group of blocks when that is lowered (pipeline/planning/bind.py), for all of them as `dask`. A
mixture has tens of thousands of tensors, each an array a stage, and a Dask array with its graph takes kilobytes and a fraction of a
millisecond.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from pipeline.tensor.placement import Region, chunk_regions

if TYPE_CHECKING:
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph

T = TypeVar("T", bound=Hashable)
Key = tuple[Any, ...]  # of a block: its array's name and its chunk index, as Dask has it
Index = tuple[int, ...]
Chunks = tuple[tuple[int, ...], ...]
# A function of blocks that gives a block: mostly a named tuple with `__call__`, which is small, survives pickling, and is no
# Callable to a type checker.
Maker = Any


@dataclass(frozen=True, eq=False)
class Grid:
    """How an array is cut: the lengths of its chunks along each axis. There is one object for all arrays cut alike (`grid`)."""

    chunks: Chunks

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sum, self.chunks))

    @cached_property
    def numblocks(self) -> tuple[int, ...]:
        return tuple(map(len, self.chunks))

    @cached_property
    def regions(self) -> Mapping[Index, Region]:
        """The region of each chunk by its index, in C order."""
        return dict(chunk_regions(self.chunks))

    def __reduce__(self) -> tuple[Any, ...]:
        return grid, (self.chunks,)


@lru_cache(maxsize=1 << 12)
def grid(chunks: Chunks) -> Grid:
    """The grid of some chunks."""
    return Grid(chunks)


@lru_cache(maxsize=1 << 12)
def shared(value: T) -> T:
    """The first of equal values: what thousands of arrays have in common is held once."""
    return value


class SmallTask(NamedTuple):
    """The making of one block: `make(*blocks)`, of the blocks whose numbers are in `needs`. Reads no value of them.

    `number`: of the block, among those that are made together.
    """

    number: int
    make: Maker
    needs: tuple[Any, ...] = ()

    def __call__(self, values: Mapping[Any, Any]) -> Any:
        return self.make(*[values[key] for key in self.needs])


# Small tasks by their block, each with the stage that it is of. A block is its array and its chunk index, or a key of Dask's.
Needed = dict[Any, tuple[SmallTask, str]]


class BlockArray(ABC):
    """An array in chunks, whose value is for each chunk a block that nothing has read.

    Attributes
    ----------
    grid
        How it is cut.
    dtype
        Of its values.
    inputs
        The arrays that its blocks are made of.
    stage
        The stage that made it, "" until a pipeline of stages says so, once.
    """

    __slots__ = ("_hash", "_name", "dtype", "grid", "inputs", "stage")

    def __init__(self, cut: Grid, dtype: np.dtype, inputs: tuple[BlockArray, ...] = ()) -> None:
        self.grid, self.dtype, self.inputs, self.stage, self._name = cut, dtype, inputs, "", ""
        # Taken once, as that of what is derived many times over goes through all that it is derived of.
        self._hash = hash((id(cut), inputs)) if inputs else id(self)

    @abstractmethod
    def naming(self) -> str:
        """A name that decides the array's values: arrays of one name are one to a scheduler."""

    @abstractmethod
    def make(self, index: Index) -> Maker:
        """A function of blocks that gives the block at a chunk index."""

    def needs(self, index: Index) -> Iterable[tuple[BlockArray, Index]]:
        """The blocks that `make(index)` takes, in order: the same ones of each input, unless a subclass says otherwise."""
        return [(array, index) for array in self.inputs]

    @property
    def by_rows(self) -> bool:
        """Whether some of its rows are made of a few rows of each input, or of a file's bytes, and of nothing else."""
        return False

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether the same is made of the same inputs, which a name tells; without inputs, whether it is the same object."""
        if self is other:
            return True
        if not isinstance(other, BlockArray) or not self.inputs:
            return False
        return self.grid is other.grid and self.inputs == other.inputs and self.name == other.name

    @property
    def name(self) -> str:
        if not self._name:
            self._name = self.naming()
        return self._name

    @property
    def chunks(self) -> Chunks:
        return self.grid.chunks

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid.shape

    @property
    def numblocks(self) -> tuple[int, ...]:
        return self.grid.numblocks

    @property
    def npartitions(self) -> int:
        return math.prod(self.grid.numblocks)

    @property
    def chunksize(self) -> tuple[int, ...]:
        return tuple(max(lengths) for lengths in self.grid.chunks)

    @property
    def ndim(self) -> int:
        return len(self.grid.chunks)

    @property
    def size(self) -> int:
        return math.prod(self.grid.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def collect(self, index: Index, needed: Needed) -> int:
        """Add the small tasks that make the block at a chunk index to `needed`, sources first, and return the block's number."""
        block = (self, index)
        if block not in needed:
            before = tuple([array.collect(place, needed) for array, place in self.needs(index)])
            needed[block] = SmallTask(len(needed), self.make(index), before), self.stage
        return needed[block][0].number

    def sources(self, index: Index, found: dict[Any, Maker], seen: set[Any]) -> None:
        """Add to `found` how those blocks are made that a block is made of and that are made of none, without naming any.

        `seen`: the blocks that were looked at before, which are left out.
        """
        block = (self, index)
        if block in seen:
            return
        seen.add(block)
        if not self.inputs:
            found[block] = self.make(index)
        for array, place in self.needs(index):
            array.sources(place, found, seen)

    @property
    def dask(self) -> HighLevelGraph:
        """The graph of Dask that makes all blocks, a layer for each array that these are made of."""
        from dask._task_spec import Task, TaskRef
        from dask.highlevelgraph import HighLevelGraph

        needed: Needed = {}
        for index in self.grid.regions:
            self.collect(index, needed)
        keys = {
            task.number: (block[0].name, *block[1]) if isinstance(block[0], BlockArray) else block
            for block, (task, _) in needed.items()
        }
        layers: dict[str, dict[Key, Task]] = {}
        dependencies: dict[str, set[str]] = {}
        for task, _ in needed.values():
            key = keys[task.number]
            # Beside blocks, a task that opens a chunk of scratch needs something by its name.
            layers.setdefault(key[0], {})[key] = Task(key, task.make, *(TaskRef(keys.get(need, need)) for need in task.needs))
            others = {keys[need][0] for need in task.needs if need in keys}
            dependencies.setdefault(key[0], set()).update(others - {key[0]})
        return HighLevelGraph(layers, dependencies)

    def to_dask(self) -> da.Array:
        """The same as a Dask array."""
        import dask.array as da

        return da.Array(self.dask, self.name, chunks=self.chunks, meta=np.empty((0,) * self.ndim, dtype=self.dtype))

    def __getitem__(self, part: Any) -> BlockArray:
        """A part of it, as Dask slices arrays; with steps of 1, as blocks are."""
        return DaskBlocks(self.to_dask()[part])


class DaskBlocks(BlockArray):
    """A Dask array that was made by other means, such as another package's, whose chunks are blocks."""

    __slots__ = ("nodes",)

    def __init__(self, array: da.Array) -> None:
        super().__init__(grid(array.chunks), array.dtype)
        self._name, self.nodes = array.name, dict(array.dask)

    def naming(self) -> str:
        return self._name

    def make(self, index: Index) -> Maker:
        return _taken_apart(self.nodes[(self.name, *index)])[0]

    def collect(self, index: Index, needed: Needed) -> int:
        """Follow the array's own graph. A node that opens a source is of the stage that says so."""
        return self._follow((self.name, *index), needed)

    def sources(self, index: Index, found: dict[Any, Maker], seen: set[Any]) -> None:  # noqa: ARG002
        """Follow the array's own graph."""
        needed: Needed = {}
        self.collect(index, needed)
        found |= {block: task.make for block, (task, _) in needed.items() if not any(isinstance(n, int) for n in task.needs)}

    def _follow(self, key: Key, needed: Needed) -> int:
        if key not in needed:
            make, needs = _taken_apart(self.nodes[key])
            before = tuple([self._follow(need, needed) if need in self.nodes else need for need in needs])
            needed[key] = SmallTask(len(needed), make, before), getattr(make, "stage", self.stage)
        return needed[key][0].number


class RunNode(NamedTuple):
    """A node of a Dask graph as a function of the blocks whose keys are `needs`."""

    node: Any
    needs: tuple[Any, ...]

    def __call__(self, *blocks: Any) -> Any:
        return self.node(dict(zip(self.needs, blocks, strict=True)))


def _taken_apart(node: Any) -> tuple[Maker, tuple[Any, ...]]:
    """A node of a Dask graph as a function of blocks and their keys: its own function, where that takes nothing else."""
    from dask._task_spec import Task, TaskRef

    if isinstance(node, Task) and not node.kwargs and all(isinstance(each, TaskRef) for each in node.args):
        return node.func, tuple(each.key for each in node.args)
    needs = tuple(sorted(node.dependencies, key=str))
    return RunNode(node, needs), needs


def block_array(array: BlockArray | da.Array) -> BlockArray:
    """An array as stages take it: a Dask array is followed by its graph."""
    return array if isinstance(array, BlockArray) else DaskBlocks(array)
