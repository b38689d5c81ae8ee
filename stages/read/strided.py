"""A tensor whose elements lie at strides in a local file: transposed, expanded, or a slice of a larger one.

A region is copied from windows of the file, each mapped and unmapped in turn, so that besides the result only one window is in
memory, however far apart the elements are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.tensor.mapping import file_bytes
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, shift, slices
from pipeline.tensor.tensors import Block

WINDOW_BYTES = 2 << 20


@dataclass(frozen=True)
class StridedTensor:
    """`shape` elements of `dtype`, the first at byte `offset` of the file at `path`, `strides` elements apart along each axis."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]

    def block(self, region: Region) -> Block:
        return StridedBlock(self, region)


class StridedBlock(Block):
    """A region of a StridedTensor; nothing is mapped until it is read."""

    def __init__(self, tensor: StridedTensor, region: Region) -> None:
        self.tensor, self.region = tensor, region
        self.shape, self.dtype = extent(region), tensor.dtype

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`, relative to the block, in C order. Raises OSError where the file has become shorter."""
        tensor = self.tensor
        region = shift(region, [start for start, _ in self.region])
        result = np.empty(extent(region), dtype=tensor.dtype)
        if not result.size:
            return result
        with meter("read", result.nbytes):
            descriptor = os.open(tensor.path, os.O_RDONLY)
            try:
                for part in windows(region, tensor.strides, WINDOW_BYTES // tensor.dtype.itemsize):
                    self._copy(descriptor, part, result[slices(shift(part, [first for first, _ in region], -1))])
            finally:
                os.close(descriptor)
        return result

    def _copy(self, descriptor: int, part: Region, target: np.ndarray) -> None:
        """Copy one window to `target`; it is unmapped on return, before the next is mapped."""
        tensor = self.tensor
        steps = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        start = tensor.offset + sum(first * step for (first, _), step in zip(part, steps, strict=True))
        stop = start + span(target.shape, tensor.strides) * tensor.dtype.itemsize
        if os.fstat(descriptor).st_size < stop:
            raise OSError(f"{tensor.path} has become shorter than its header says: it was changed while being read")
        window = file_bytes(descriptor, tensor.path, start, stop)
        target[...] = np.ndarray(target.shape, tensor.dtype, window.data, 0, steps)


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements of storage from a part's first to its last element, both included. No axis may be empty."""
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def windows(region: Region, strides: Sequence[int], limit: int) -> Iterator[Region]:
    """Cut a region into parts that each span at most `limit` elements of storage, across the axis of the longest stride first."""
    shape = extent(region)
    if span(shape, strides) <= limit:
        yield region
        return
    axis = max((axis for axis, length in enumerate(shape) if length > 1), key=lambda axis: strides[axis])
    inner = span(shape, strides) - (shape[axis] - 1) * strides[axis]
    step = max((limit - inner) // strides[axis] + 1, 1)
    first, last = region[axis]
    for start in range(first, last, step):
        part = (*region[:axis], (start, min(start + step, last)), *region[axis + 1 :])
        yield from windows(part, strides, limit)


def contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether elements at these strides lie in C order without gaps; the stride of an axis of length 1 does not matter."""
    if 0 in shape:
        return True
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
