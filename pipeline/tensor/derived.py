"""Arrays whose blocks are made of several other arrays: a quantized weight of its codes, scales and zero points.

`Applied` (tensors.py) maps the rows of one array; here a block may need any part of any input, and says which when it is read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.tensor.arrays import BlockArray, Grid, Index, Maker, block_array, grid
from pipeline.tensor.placement import Region, extent, intersect, shift, slices, whole
from pipeline.tensor.tensors import Block

# Makes the values of a region from whole inputs, which it reads as much of as it needs; where numbers of rows are noted beside them
# (pipeline/tensor/noted.py), the pair of both.
Make = Callable[..., Any]
NOTHING = np.empty(0)
UNOWNED: dict[str, int] = {}  # of blocks that keep no rows


class Derived(Block):
    """A region of a derived array: `make(region, **inputs, **arguments)`, in the coordinates of the whole, gives its values.

    `ahead`: rows that are made at once and kept for the next readings, where few rows cost as much as many: a source packed along
    its columns gives up a page of memory for each of them.
    """

    __slots__ = ("_first", "_kept", "_owner", "ahead", "arguments", "dtype", "inputs", "make", "region", "shape")

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
        self.ahead, self._first, self._kept = ahead, 0, NOTHING
        self._owner: dict[str, int] = {} if ahead else UNOWNED

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
            self._kept = NOTHING
            self._owner.clear()
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (self.region, self.dtype, self.make, self.inputs, self.arguments, self.ahead)

    def _make(self, region: Region) -> np.ndarray:
        values: np.ndarray = self.make(shift(region, [start for start, _ in self.region]), **self.inputs, **self.arguments)
        return values


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


class Derivation(NamedTuple):
    """All that arrays of one kind have in common: how their blocks are made, of inputs that are cut alike.

    `keys`, `inputs`: the names, dtypes and grids of the inputs. `names`: of the other arguments. `by_place`: a block needs of each
    input, which is cut as the array is, the block at its own place alone.
    """

    label: str
    make: Make
    dtype: np.dtype
    cut: Grid
    keys: tuple[str, ...]
    inputs: tuple[tuple[np.dtype, Grid], ...]
    names: tuple[str, ...]
    ahead: int
    by_place: bool

    def block(self, region: Region, values: Sequence[Any], blocks: Sequence[Block]) -> Block:
        """The block of a region, of the blocks of the inputs that it needs, one input after the other, without reading them."""
        arguments = dict(zip(self.names, values, strict=True))
        inputs = self.inputs_at(region, blocks) if self.by_place else self.inputs_of(blocks)
        return Derived(region, self.dtype, self.make, inputs, arguments, self.ahead)

    def inputs_at(self, region: Region, blocks: Sequence[Block]) -> dict[str, Block]:
        """Each input as one block that knows the values of a region alone."""
        return {
            key: Mosaic(cut.shape, dtype, (region,), (block,))
            for key, (dtype, cut), block in zip(self.keys, self.inputs, blocks, strict=True)
        }

    def inputs_of(self, blocks: Sequence[Block]) -> dict[str, Block]:
        """Each input as one block, of all blocks of the inputs, one input after the other."""
        inputs, rest = {}, list(blocks)
        for key, (dtype, cut) in zip(self.keys, self.inputs, strict=True):
            own, rest = rest[: len(cut.regions)], rest[len(cut.regions) :]
            inputs[key] = own[0] if len(own) == 1 else Mosaic(cut.shape, dtype, tuple(cut.regions.values()), own)
        return inputs


class OpenDerived(NamedTuple):
    """Makes a block of a derived array. `values`: the arguments that are not arrays."""

    kind: Derivation
    values: tuple[Any, ...]
    region: Region

    def __call__(self, *blocks: Block) -> Block:
        return self.kind.block(self.region, self.values, blocks)


class DerivedArray(BlockArray):
    """An array whose blocks may need any part of its inputs."""

    __slots__ = ("kind", "values")

    def __init__(self, kind: Derivation, inputs: tuple[BlockArray, ...], values: tuple[Any, ...]) -> None:
        super().__init__(kind.cut, kind.dtype, inputs)
        self.kind, self.values = kind, values

    def naming(self) -> str:
        # All that decides the values is in it.
        kind, names = self.kind, [array.name for array in self.inputs]
        decides = [str(kind.dtype), kind.cut.chunks, kind.keys, kind.names, self.values, names]
        digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
        return f"{kind.label}-{kind.make.__name__}-{digest}-{names[0]}"

    def needs(self, index: Index) -> Iterable[tuple[BlockArray, Index]]:
        """All blocks of all inputs; of those `by_place`, the ones at its own."""
        if self.kind.by_place:
            return [(array, index) for array in self.inputs]
        return [(array, place) for array in self.inputs for place in array.grid.regions]

    def sources(self, index: Index, found: dict[Any, Maker], seen: set[Any]) -> None:
        """Those of the whole array, once: each of its blocks is made of all blocks of the inputs."""
        if self.kind.by_place:
            super().sources(index, found, seen)
        elif id(self) not in seen:
            seen.add(id(self))
            for array, place in self.needs(()):
                array.sources(place, found, seen)

    def make(self, index: Index) -> Maker:
        return OpenDerived(self.kind, self.values, self.grid.regions[index])


def derive(
    label: str,
    make: Make,
    inputs: Mapping[str, BlockArray],
    *,
    shape: Sequence[int],
    dtype: np.dtype,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    ahead: int = 0,
    by_place: bool = False,
    **arguments: Any,
) -> BlockArray:
    """An array of `shape` and `dtype` that `make(region, **inputs, **arguments)` gives the values of.

    The inputs are whole, unread blocks. `rows` are the chunks of the first axis, `columns` those of the last (default: one
    chunk). `label`, with the first input's name, names the array; `make` and the arguments must survive pickling. `ahead`: see
    Derived. `by_place`: a region is made of the same region of each input, so that a block needs only those at its place
    where all are cut alike.
    """
    kind, arrays = derivation_of(
        label,
        make,
        inputs,
        shape=shape,
        dtype=dtype,
        rows=rows,
        columns=columns,
        ahead=ahead,
        names=tuple(arguments),
        by_place=by_place,
    )
    return DerivedArray(kind, arrays, tuple(arguments.values()))


def derivation_of(
    label: str,
    make: Make,
    inputs: Mapping[str, BlockArray],
    *,
    shape: Sequence[int],
    dtype: np.dtype,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    ahead: int = 0,
    names: tuple[str, ...] = (),
    by_place: bool = False,
) -> tuple[Derivation, tuple[BlockArray, ...]]:
    """The kind of a derived array, and its inputs. `names`: of the arguments; the others are those of `derive`."""
    arrays = tuple(map(block_array, inputs.values()))
    chunks: tuple[tuple[int, ...], ...] = tuple((n,) for n in shape)
    if rows is not None:
        chunks = (tuple(rows), *chunks[1:])
    if columns is not None:
        chunks = (*chunks[:-1], tuple(columns))
    cut, of_inputs = grid(chunks), tuple([(array.dtype, array.grid) for array in arrays])
    alike = by_place and all(own.chunks == chunks for _, own in of_inputs)
    return _derivation(label, make, dtype, cut, tuple(inputs), of_inputs, names, ahead, alike), arrays


@lru_cache(maxsize=1 << 12)
def _derivation(
    label: str,
    make: Make,
    dtype: np.dtype,
    cut: Grid,
    keys: tuple[str, ...],
    inputs: tuple[tuple[np.dtype, Grid], ...],
    names: tuple[str, ...],
    ahead: int,
    by_place: bool,
) -> Derivation:
    """The kind of some arrays, one object for all of them."""
    return Derivation(label, make, np.dtype(dtype), cut, keys, inputs, names, ahead, by_place)


class Constant(Block):
    """A few float32 values that are in no file."""

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values, self.shape, self.dtype = values, (len(values),), np.dtype(np.float32)

    def read(self, region: Region) -> np.ndarray:
        return np.array(self.values, dtype=self.dtype)[slices(region)]


class OpenConstant(NamedTuple):
    """Makes the block of a constant."""

    values: tuple[float, ...]

    def __call__(self) -> Block:
        return Constant(self.values)


class ConstantArray(BlockArray):
    """An array of values that are in no file."""

    __slots__ = ("values",)

    def __init__(self, name: str, values: tuple[float, ...]) -> None:
        super().__init__(grid(((len(values),),)), np.dtype(np.float32))
        self._name, self.values = f"constant-{name}", values

    def naming(self) -> str:
        return self._name

    def make(self, index: Index) -> Maker:  # noqa: ARG002
        return OpenConstant(self.values)


def constant(name: str, values: tuple[float, ...]) -> BlockArray:
    """float32 [n]: an array of values that are in no file."""
    return ConstantArray(name, values)
