"""Regions of arrays, and placements: which region of a source array goes to which region of which rank's tensor.

A `Region` is one half-open interval (start, stop) an axis. Everything here is arithmetic on plain integers.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Interval = tuple[int, int]
Region = tuple[Interval, ...]


def whole(shape: Sequence[int]) -> Region:
    """The region that covers an array of `shape`."""
    return tuple((0, size) for size in shape)


def extent(region: Region) -> tuple[int, ...]:
    """The shape of a region."""
    return tuple([stop - start for start, stop in region])


def size(region: Region) -> int:
    """The number of elements in a region."""
    elements = 1
    for start, stop in region:  # of a plan of thousands of experts, a million times
        elements *= stop - start
    return elements


def intersect(a: Region, b: Region) -> Region | None:
    """The region that two regions of one array have in common; None where they share nothing."""
    common = tuple((max(x0, y0), min(x1, y1)) for (x0, x1), (y0, y1) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def shift(region: Region, origin: Sequence[int], sign: int = 1) -> Region:
    """A region moved by `origin` (or back, with sign -1)."""
    return tuple((start + sign * by, stop + sign * by) for (start, stop), by in zip(region, origin, strict=True))


def slices(region: Region) -> tuple[slice, ...]:
    """A region as NumPy's index."""
    return tuple(slice(start, stop) for start, stop in region)


def ends(shape: Sequence[int], region: Region) -> tuple[int, int]:
    """The first element of a region of an array of `shape`, in C order, and the one behind its last."""
    first = last = 0
    for (start, stop), length in zip(region, shape, strict=True):
        first, last = first * length + start, last * length + stop - 1
    return first, last + 1


def chunk_regions(chunks: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], Region]]:
    """The index and the region of each chunk of an array. `chunks`: their lengths along each axis, as Dask has them."""
    axes = []
    for lengths in chunks:
        stops = list(itertools.accumulate(lengths))
        axes.append([(i, (stop - length, stop)) for i, (length, stop) in enumerate(zip(lengths, stops, strict=True))])
    for cell in itertools.product(*axes):
        yield tuple(i for i, _ in cell), tuple(interval for _, interval in cell)


def pieces(region: Region, itemsize: int, limit_bytes: int, row_multiple: int = 1) -> Iterator[Region]:
    """Cut a region, in C order, into parts of at most `limit_bytes`, each contiguous where the region is.

    Rows are cut at multiples of `row_multiple` from the region's start. A row of a matrix is never cut, so that a part may be
    larger than the limit where one row is.
    """
    shape = extent(region)
    if len(shape) > 1 and shape[0] == 1:
        yield from ((region[0], *rest) for rest in pieces(region[1:], itemsize, limit_bytes, row_multiple))
        return
    if len(shape) <= 1 or math.prod(shape) * itemsize <= limit_bytes:
        if len(shape) == 1 and shape[0] * itemsize > limit_bytes:
            step = max(limit_bytes // itemsize // row_multiple, 1) * row_multiple
            yield from (((s, min(s + step, region[0][1])),) for s in range(*region[0], step))
        else:
            yield region
        return
    row_bytes = math.prod(shape[1:]) * itemsize
    if row_bytes * row_multiple > limit_bytes and len(shape) > 2:
        for row in range(*region[0]):
            yield from (((row, row + 1), *rest) for rest in pieces(region[1:], itemsize, limit_bytes, row_multiple))
        return
    step = max(limit_bytes // row_bytes // row_multiple, 1) * row_multiple
    for start in range(*region[0], step):
        yield ((start, min(start + step, region[0][1])), *region[1:])


@dataclass(frozen=True, slots=True)
class Placement:
    """`source` region of an array -> `target` region of `tensor` on `rank`.

    Both regions hold the same number of elements in the same C order; the target may have extra leading axes of length 1 (an
    expert's matrix inside a stack). `source` is None for padding, which is zeros.
    """

    rank: int
    tensor: str
    source: Region | None
    target: Region

    def of(self, region: Region) -> tuple[Region, tuple[int, ...]] | None:
        """Where the values of a region of the array go, and how far that is along the array's axes; None where none of them go."""
        common = None if self.source is None else intersect(self.source, region)
        if common is None or self.source is None:
            return None
        lead = len(self.target) - len(common)
        move = tuple([t[0] - s[0] for t, s in zip(self.target[lead:], self.source, strict=True)])
        return (*self.target[:lead], *shift(common, move)), move


class Placements(ABC):
    """The placements of an array's regions, made when they are asked for. `elements`: those that they move, without padding."""

    __slots__ = ()

    @abstractmethod
    def __iter__(self) -> Iterator[Placement]: ...

    @property
    @abstractmethod
    def elements(self) -> int: ...


class FixedPlacements(Placements):
    """Some placements that are there."""

    __slots__ = ("placements",)

    def __init__(self, placements: Iterable[Placement]) -> None:
        self.placements = tuple(placements)

    def __iter__(self) -> Iterator[Placement]:
        return iter(self.placements)

    @property
    def elements(self) -> int:
        return moved(self.placements)


NOWHERE = FixedPlacements(())


class JoinedPlacements(Placements):
    """Several placements of one array, as those of tied embeddings."""

    __slots__ = ("several",)

    def __init__(self, several: Iterable[Placements]) -> None:
        self.several = tuple(several)

    def __iter__(self) -> Iterator[Placement]:
        return itertools.chain.from_iterable(self.several)

    @property
    def elements(self) -> int:
        return sum(each.elements for each in self.several)


def moved(placements: Iterable[Placement]) -> int:
    """The number of elements that placements move: of all that are no padding."""
    return sum(size(placement.target) for placement in placements if placement.source is not None)


@dataclass(frozen=True, slots=True)
class RankTensor:
    """A tensor of an output rank: its name and shape there, and its dtype by TensorRT-LLM's name.

    `stored`: the shape and dtype by which placements count, where the bytes pass for something else in the file.
    """

    rank: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[tuple[int, ...], str] | None = None


def runs(shape: Sequence[int], region: Region) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """The contiguous runs of `region` in a C-ordered tensor of `shape`: (first element, index of the run, elements).

    The index is relative to the region and addresses the part of the region's values that the run takes.
    """
    axis = len(shape)
    while axis and region[axis - 1] == (0, shape[axis - 1]):
        axis -= 1
    axis = max(axis - 1, 0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    length = size(region[axis:])
    base = sum(start * stride for (start, _), stride in zip(region, strides, strict=True))
    leading = extent(region[:axis])
    for flat in range(math.prod(leading)):
        index, rest = [], flat
        for n in reversed(leading):
            rest, position = divmod(rest, n)
            index.append(position)
        index.reverse()
        yield base + sum(i * s for i, s in zip(index, strides, strict=False)), tuple(index), length


@dataclass(frozen=True, slots=True)
class Located:
    """A contiguous part of a tensor on disk: `region` of the tensor is the bytes from `offset` of the file at `path`.

    `chunk`: the name of the chunk of scratch that it is in, "" in a rank file. `file_bytes`: the size of a chunk's file, which is
    made by the first task that writes to it; 0 for a file that is there.
    """

    path: str
    offset: int
    region: Region
    chunk: str = ""
    file_bytes: int = 0


def contiguous(shape: Sequence[int], region: Region) -> Iterator[tuple[int, Region]]:
    """The parts of `region` that are contiguous in a C-ordered tensor of `shape`: (their first element, the part)."""
    for first, index, _ in runs(shape, region):
        lead = tuple((region[axis][0] + i, region[axis][0] + i + 1) for axis, i in enumerate(index))
        yield first, (*lead, *region[len(index) :])
