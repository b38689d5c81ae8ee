"""A tensor whose parts lie in several files: read as one, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.tensor.placement import Region, extent, intersect, shift, slices
from pipeline.tensor.tensors import Block, LazyTensor


@dataclass(frozen=True)
class JoinedTensor:
    """`parts`, equal but for their lengths on `axis`, one behind the other on that axis."""

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
        """The parts that a region touches: each part, the region of it, and where that lies in the joined tensor."""
        start = 0
        for part in self.parts:
            length = part.shape[self.axis]
            whole = tuple((start, start + length) if axis == self.axis else (0, size) for axis, size in enumerate(self.shape))
            common = intersect(region, whole)
            if common is not None:
                yield part, shift(common, [low for low, _ in whole], -1), common
            start += length


class JoinedBlock(Block):
    """A region of a JoinedTensor; nothing is read until it is asked for."""

    def __init__(self, tensor: JoinedTensor, region: Region) -> None:
        self.tensor, self.region = tensor, region
        self.shape, self.dtype = extent(region), tensor.dtype

    def read(self, region: Region) -> np.ndarray:
        wanted = shift(region, [start for start, _ in self.region])
        touched = list(self.tensor.within(wanted))
        if len(touched) == 1:
            part, inside, _ = touched[0]
            return np.asarray(part.block(inside))
        result = np.empty(extent(region), dtype=self.dtype)
        for part, inside, common in touched:
            result[slices(shift(common, [start for start, _ in wanted], -1))] = np.asarray(part.block(inside))
        return result
