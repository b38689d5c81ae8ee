"""A tensor whose parts lie in several files, read as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.tensor.placement import Region, extent, intersect, shift, slices
from pipeline.tensor.tensors import Block, LazyTensor


@dataclass(frozen=True)
class JoinedTensor:
    """The concatenation of `parts` along `axis`. They have the same dtype, and the same shape but for that axis."""

    parts: tuple[LazyTensor, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.axis], sum(part.shape[self.axis] for part in self.parts), *first[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def block(self, region: Region) -> Block:
        return JoinedBlock(self, region)

    def within(self, region: Region) -> Iterator[tuple[LazyTensor, Region, Region]]:
        """Yield the parts that a region overlaps: the part, the overlap as a region of the part, and the overlap in the tensor."""
        start = 0
        for part in self.parts:
            length = part.shape[self.axis]
            whole = tuple((start, start + length) if axis == self.axis else (0, size) for axis, size in enumerate(self.shape))
            common = intersect(region, whole)
            if common is not None:
                yield part, shift(common, [low for low, _ in whole], -1), common
            start += length


class JoinedBlock(Block):
    """A region of a JoinedTensor; nothing is read until `read` is called."""

    def __init__(self, tensor: JoinedTensor, region: Region) -> None:
        self.tensor, self.region = tensor, region
        self.shape, self.dtype = extent(region), tensor.dtype

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`, relative to the block, in C order; a view of the file where one part has all of them."""
        in_tensor = shift(region, [start for start, _ in self.region])
        overlaps = list(self.tensor.within(in_tensor))
        if len(overlaps) == 1:
            part, inside, _ = overlaps[0]
            return np.asarray(part.block(inside))
        result = np.empty(extent(region), dtype=self.dtype)
        for part, inside, common in overlaps:
            result[slices(shift(common, [start for start, _ in in_tensor], -1))] = np.asarray(part.block(inside))
        return result
