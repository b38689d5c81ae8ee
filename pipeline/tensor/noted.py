"""Two arrays that one making gives: values, and a few numbers of each of their rows, as codes and the scales that they need.

The numbers are noted while the values are made, so that reading them afterwards reads nothing again. They are small beside the
values. Where the values were not made before, or elsewhere, the numbers are made alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.tensor.arrays import BlockArray, Grid, Index, Maker, grid
from pipeline.tensor.derived import NOTHING, Derivation, Derived, DerivedArray, Make, derivation_of
from pipeline.tensor.placement import Region, extent, shift, slices
from pipeline.tensor.tensors import Block


class Notes(NamedTuple):
    """The numbers that are noted: float32 or another type, `width` for each of `rows` rows that a row of the values stands for.

    `alone(region, **inputs, **arguments)` makes a region of them without the values.
    """

    alone: Make
    dtype: np.dtype
    rows: int
    width: int

    def region(self, values: Region) -> Region:
        """The region of the numbers that goes with one of the values."""
        *front, (first, last), _ = values
        return (*front, (first * self.rows, last * self.rows), (0, self.width))


class Noting(Derived):
    """A region of the values. Its `make` gives a pair: the values, and the numbers of all rows that the region has a part of."""

    __slots__ = ("_known", "_numbers", "notes")

    def __init__(
        self, region: Region, dtype: np.dtype, make: Make, inputs: Mapping[str, Block], arguments: Mapping[str, Any], notes: Notes
    ) -> None:
        super().__init__(region, dtype, make, inputs, arguments)
        self.notes = notes
        self._known: np.ndarray = np.empty(0, dtype=bool)
        self._numbers: np.ndarray = NOTHING

    def read(self, region: Region) -> np.ndarray:
        both: tuple[np.ndarray, np.ndarray] = self.make(
            shift(region, [start for start, _ in self.region]), **self.inputs, **self.arguments
        )
        values, numbers = both
        if not self._known.size:
            self._known = np.zeros(self.shape[:-1], dtype=bool)
            self._numbers = np.empty(extent(self.notes.region(tuple((0, n) for n in self.shape))), dtype=self.notes.dtype)
        self._numbers[slices(self.notes.region(region))] = numbers
        self._known[slices(region[:-1])] = True
        return values

    def numbers(self, region: Region) -> np.ndarray:
        """A region of the numbers: those that were noted, or made alone where some were not."""
        *front, (first, last), width = region
        rows = self.notes.rows
        if self._known.size and self._known[slices((*front, (first // rows, -(-last // rows))))].all():
            part: np.ndarray = self._numbers[slices(region)]
            return part
        *before, (start, _), _ = self.region
        origin = [*(low for low, _ in before), start * rows, 0]
        alone: np.ndarray = self.notes.alone(shift((*front, (first, last), width), origin), **self.inputs, **self.arguments)
        return alone

    def forget(self) -> None:
        """Give up what was noted."""
        self._known, self._numbers = np.empty(0, dtype=bool), NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return Noting, (self.region, self.dtype, self.make, self.inputs, self.arguments, self.notes)


class Noted(Block):
    """The numbers of a block of values."""

    def __init__(self, values: Noting) -> None:
        self.values, self.dtype = values, values.notes.dtype
        self.shape = extent(values.notes.region(tuple((0, n) for n in values.shape)))

    def read(self, region: Region) -> np.ndarray:
        result = self.values.numbers(region)
        if all(last == size for (_, last), size in zip(region, self.shape, strict=True)):  # read to the end
            self.values.forget()
        return result


class OpenNoting(NamedTuple):
    """Makes a block of the values."""

    kind: Derivation
    values: tuple[Any, ...]
    region: Region
    notes: Notes

    def __call__(self, *blocks: Block) -> Block:
        inputs = self.kind.inputs_of(blocks)
        arguments = dict(zip(self.kind.names, self.values, strict=True))
        return Noting(self.region, self.kind.dtype, self.kind.make, inputs, arguments, self.notes)


class NotingArray(DerivedArray):
    """The values."""

    __slots__ = ("notes",)

    def __init__(self, kind: Derivation, inputs: tuple[BlockArray, ...], values: tuple[Any, ...], notes: Notes) -> None:
        super().__init__(kind, inputs, values)
        self.notes = notes

    def make(self, index: Index) -> Maker:
        return OpenNoting(self.kind, self.values, self.grid.regions[index], self.notes)


class NotedArray(BlockArray):
    """The numbers: a chunk for each chunk of the values."""

    __slots__ = ()

    def __init__(self, values: NotingArray) -> None:
        notes = values.notes
        *front, rows, _ = values.chunks
        super().__init__(_grid((*front, rows), notes), notes.dtype, (values,))

    @property
    def of(self) -> BlockArray:
        """The values, whose chunks are best made before those of the numbers, by the same task."""
        return self.inputs[0]

    def naming(self) -> str:
        return f"noted-{self.inputs[0].name}"

    def make(self, index: Index) -> Maker:  # noqa: ARG002
        return Noted


def _grid(chunks: Sequence[tuple[int, ...]], notes: Notes) -> Grid:
    *front, rows = chunks
    return grid((*front, tuple(length * notes.rows for length in rows), (notes.width,)))


def derive_noting(
    label: str,
    make: Make,
    notes: Notes,
    inputs: Mapping[str, BlockArray],
    *,
    shape: Sequence[int],
    dtype: np.dtype,
    rows: Sequence[int],
    **arguments: Any,
) -> tuple[BlockArray, BlockArray]:
    """An array of `shape` and `dtype`, and the numbers of its rows, an array with one axis fewer than that and `notes.width`.

    `make` is as `Noting` has it. The other arguments are those of `derive`.
    """
    kind, arrays = derivation_of(label, make, inputs, shape=shape, dtype=dtype, rows=rows, names=tuple(arguments))
    values = NotingArray(kind, arrays, tuple(arguments.values()), notes)
    return values, NotedArray(values)
