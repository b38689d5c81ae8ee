"""Arrays whose blocks are made of several other arrays: a quantized weight of its codes, scales and zero points.

`Applied` (tensors.py) maps the rows of one array; here a block may need any part of any input, and says which when it is read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.tensor.placement import Region, chunk_regions, extent, intersect, shift, slices, whole
from pipeline.tensor.tensors import Block

if TYPE_CHECKING:
    import dask.array as da

# Makes the values of a region from whole inputs, which it reads as much of as it needs.
Make = Callable[..., np.ndarray]


class Derived(Block):
    """A region of a derived array: `make(region, **inputs, **arguments)`, in the coordinates of the whole, gives its values.

    `ahead`: rows that are made at once and kept for the next readings, where few rows cost as much as many: a source packed along
    its columns gives up a page of memory for each of them.
    """

    def __init__(
        self,
        region: Region,
        dtype: np.dtype,
        make: Make,
        inputs: Mapping[str, Block],
        arguments: Mapping[str, Any],
        ahead: int = 0,
    ) -> None:
        self.region, self.shape, self.dtype = region, extent(region), np.dtype(dtype)
        self.make, self.inputs, self.arguments = make, inputs, arguments
        self.ahead, self._first, self._kept = ahead, 0, np.empty(0)
        self._owner: dict[str, int] = {}

    def read(self, region: Region) -> np.ndarray:
        first, last = region[0] if region else (0, 0)
        if last - first >= self.ahead:
            return self._make(region)
        # The rows that are kept are those of one thread, until it has read to the end; another makes its own.
        if self._owner.setdefault("thread", threading.get_ident()) != threading.get_ident():
            return self._make(region)
        if not self._first <= first <= last <= self._first + len(self._kept):
            self._first = first
            self._kept = self._make(((first, min(first + self.ahead, self.shape[0])), *whole(self.shape[1:])))
        part = self._kept[(slice(first - self._first, last - self._first), *slices(region[1:]))]
        if last == self.shape[0]:  # read to the end, which comes last
            self._kept = np.empty(0)
            self._owner.clear()
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": np.empty(0), "_first": 0, "_owner": {}}

    def _make(self, region: Region) -> np.ndarray:
        return self.make(shift(region, [start for start, _ in self.region]), **self.inputs, **self.arguments)


class Mosaic(Block):
    """A whole array that comes in several blocks, as one: `blocks[i]` lies at `regions[i]`."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, regions: Sequence[Region], blocks: Sequence[Block]) -> None:
        self.shape, self.dtype, self.regions, self.blocks = shape, np.dtype(dtype), regions, blocks

    def read(self, region: Region) -> np.ndarray:
        touched = [(intersect(region, place), place, block) for place, block in zip(self.regions, self.blocks, strict=True)]
        parts = [(common, place, block) for common, place, block in touched if common is not None]
        if len(parts) == 1:
            common, place, block = parts[0]
            return block.read(shift(common, [start for start, _ in place], -1))
        result = np.empty(extent(region), dtype=self.dtype)
        for common, place, block in parts:
            part = block.read(shift(common, [start for start, _ in place], -1))
            result[slices(shift(common, [start for start, _ in region], -1))] = part
        return result


def derive(
    label: str,
    make: Make,
    inputs: Mapping[str, da.Array],
    *,
    shape: Sequence[int],
    dtype: np.dtype,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    ahead: int = 0,
    **arguments: Any,
) -> da.Array:
    """An array of `shape` and `dtype` that `make(region, **inputs, **arguments)` gives the values of.

    The inputs are whole, unread blocks. `rows` are the chunks of the first axis, `columns` those of the last (default: one
    chunk). `label`, with the first input's name, names the array; `make` and the arguments must survive pickling. `ahead`: see
    Derived.
    """
    import dask.array as da
    from dask._task_spec import Dict, List, Task, TaskRef
    from dask.highlevelgraph import HighLevelGraph

    chunks: tuple[tuple[int, ...], ...] = tuple((n,) for n in shape)
    if rows is not None:
        chunks = (tuple(rows), *chunks[1:])
    if columns is not None:
        chunks = (*chunks[:-1], tuple(columns))
    # Two arrays of one name are one to a scheduler, so that all that decides the values is in it.
    decides = [tuple(shape), str(dtype), chunks, sorted(arguments.items()), [array.name for array in inputs.values()]]
    digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
    name = f"{label}-{make.__name__}-{digest}-{next(iter(inputs.values())).name}"
    sources = {key: (array.shape, array.dtype, *_grid(array)) for key, array in inputs.items()}
    places = {key: (size, kind, regions) for key, (size, kind, _, regions) in sources.items()}
    graph = {}
    for index, region in chunk_regions(chunks):
        key = (name, *index)
        parts = Dict({key_: List(*map(TaskRef, keys)) for key_, (_, _, keys, _) in sources.items()})
        graph[key] = Task(key, _open, region, np.dtype(dtype), make, parts, places, arguments, ahead)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=list(inputs.values()))
    return da.Array(layers, name, chunks=chunks, meta=np.empty((0,) * len(shape), dtype=dtype))


class Constant(Block):
    """A few float32 values that are in no file."""

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values, self.shape, self.dtype = values, (len(values),), np.dtype(np.float32)

    def read(self, region: Region) -> np.ndarray:
        return np.array(self.values, dtype=self.dtype)[slices(region)]


def constant(name: str, values: tuple[float, ...]) -> da.Array:
    """float32 [n]: an array of values that are in no file."""
    import dask.array as da
    from dask._task_spec import Task

    key = (f"constant-{name}", 0)
    return da.Array({key: Task(key, Constant, values)}, key[0], chunks=((len(values),),), meta=np.empty((0,), dtype=np.float32))


def _grid(array: da.Array) -> tuple[list[tuple[Any, ...]], list[Region]]:
    """The keys of an array's blocks, and the region of each."""
    keys, regions = [], []
    for index, region in chunk_regions(array.chunks):
        keys.append((array.name, *index))
        regions.append(region)
    return keys, regions


def _open(
    region: Region,
    dtype: np.dtype,
    make: Make,
    parts: Mapping[str, Sequence[Block]],
    places: Mapping[str, tuple[tuple[int, ...], np.dtype, Sequence[Region]]],
    arguments: Mapping[str, Any],
    ahead: int,
) -> Block:
    """Run a derived block's task: put the block together from the blocks of its inputs, without reading them."""
    inputs = {
        key: blocks[0] if len(blocks) == 1 else Mosaic(places[key][0], places[key][1], places[key][2], blocks)
        for key, blocks in parts.items()
    }
    return Derived(region, dtype, make, inputs, arguments, ahead)
