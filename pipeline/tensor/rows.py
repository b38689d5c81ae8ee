"""Some of an array's rows: slices of its blocks, one after the other. What a fused source is taken apart with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pipeline.tensor.arrays import BlockArray, Index, Maker, block_array, grid, shared
from pipeline.tensor.placement import Interval

Slice = tuple[int, Interval]  # of a chunk, by its number on the axis


class TakenRows(BlockArray):
    """The slices of an array's chunks on one axis, each a chunk."""

    __slots__ = ("axis", "slices")

    def __init__(self, array: BlockArray, slices: tuple[Slice, ...], axis: int) -> None:
        lengths = tuple(stop - start for _, (start, stop) in slices)
        chunks = (*array.chunks[:axis], lengths, *array.chunks[axis + 1 :])
        super().__init__(grid(chunks), array.dtype, (array,))
        self.slices, self.axis = slices, axis

    @property
    def by_rows(self) -> bool:
        return True

    def naming(self) -> str:
        text = ".".join(f"{number}:{start}:{stop}" for number, (start, stop) in self.slices)
        return f"rows-{self.axis}-{text}-{self.inputs[0].name}"

    def needs(self, index: Index) -> Iterable[tuple[BlockArray, Index]]:
        """The chunk that a slice is of."""
        number, _ = self.slices[index[self.axis]]
        return [(self.inputs[0], (*index[: self.axis], number, *index[self.axis + 1 :]))]

    def make(self, index: Index) -> Maker:
        return Rows(self.axis, *self.slices[index[self.axis]][1])


class Rows(NamedTuple):
    """Slices a block on one axis."""

    axis: int
    start: int
    stop: int

    def __call__(self, block: Any) -> Any:
        if (self.start, self.stop) == (0, block.shape[self.axis]):
            return block
        return block[(*(slice(None),) * self.axis, slice(self.start, self.stop))]


def take_rows(array: BlockArray, intervals: Sequence[Interval], axis: int) -> BlockArray:
    """The elements of `array` that lie in the intervals of one axis, in the order of these."""
    array, slices = block_array(array), []
    for first, last in intervals:
        start = 0
        for number, length in enumerate(array.chunks[axis]):
            low, high = max(first, start), min(last, start + length)
            if low < high:
                slices.append((number, (low - start, high - start)))
            start += length
    return TakenRows(array, shared(tuple(slices)), axis)
