"""A tensor that is one run of bytes in a local file, memory-mapped a piece at a time.

A piece is mapped when it is read and unmapped when its array is garbage-collected, so that no page of the file stays mapped longer.
Where the file system has no maps, pieces are read instead.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.tensor.mapping import file_bytes
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, shift, slices, whole
from pipeline.tensor.system_errors import naming
from pipeline.tensor.tensors import Block

WINDOW_BYTES = 8 << 20  # mapped at once where only some columns are read


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """`shape` elements of `dtype` in C order, from byte `offset` of the file at `path`."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stage: str = "read"  # that its bytes are metered as
    by_rows: ClassVar[bool] = True

    def block(self, region: Region) -> Block:
        return MappedBlock(self, region)

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> MappedTensor:
        """The same bytes as an array of another shape and type."""
        return MappedTensor(self.path, self.offset, shape, dtype, self.stage)


class MappedBlock(Block):
    """A region of a MappedTensor; nothing is mapped until it is read."""

    __slots__ = ("dtype", "region", "shape", "tensor")

    def __init__(self, tensor: MappedTensor, region: Region) -> None:
        self.tensor, self.region = tensor, region
        self.shape, self.dtype = extent(region), tensor.dtype

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`, relative to the block, as a read-only view of mapped pages where that is possible.

        A few columns of many rows are copied out of windows of WINDOW_BYTES instead. Raises OSError where the file has become
        shorter than its header says.
        """
        tensor = self.tensor
        region = shift(region, [start for start, _ in self.region])
        if not tensor.shape:
            return self._map(0, 1).reshape(())
        row = math.prod(tensor.shape[1:])
        first, last = region[0]
        if last <= first or not row:
            return np.empty(extent(region), dtype=tensor.dtype)
        if len(tensor.shape) > 2 and last - first == 1:
            # Rows of a single matrix of a stack are contiguous as well.
            inner = math.prod(tensor.shape[2:])
            top, bottom = region[1]
            values = self._map(first * row + top * inner, (bottom - top) * inner)
            values = values.reshape(1, bottom - top, *tensor.shape[2:])
            return values[(slice(None), slice(None), *slices(region[2:]))]
        if region[1:] == whole(tensor.shape[1:]):
            return self._map(first * row, (last - first) * row).reshape(last - first, *tensor.shape[1:])
        step = max(WINDOW_BYTES // (row * tensor.dtype.itemsize), 1)
        if step >= last - first:
            values = self._map(first * row, (last - first) * row).reshape(last - first, *tensor.shape[1:])
            return values[(slice(None), *slices(region[1:]))]
        # A few columns of many rows: a single map would keep the pages of whole rows in memory for a part of each.
        result = np.empty(extent(region), dtype=tensor.dtype)
        for start in range(first, last, step):
            count = min(step, last - start)
            values = self._map(start * row, count * row).reshape(count, *tensor.shape[1:])
            result[start - first : start - first + count] = values[(slice(None), *slices(region[1:]))]
        return result

    def part(self, region: Region) -> Block:
        return self.tensor.block(shift(region, [start for start, _ in self.region]))

    def read_into(self, out: np.ndarray) -> bool:
        tensor, region = self.tensor, self.region
        split = next((axis for axis, (start, stop) in enumerate(region) if stop - start != 1), len(region))
        if region[split + 1 :] != whole(tensor.shape[split + 1 :]):
            return False
        first = 0
        for (start, _), length in zip(region, tensor.shape, strict=True):
            first = first * length + start
        at, left = tensor.offset + first * tensor.dtype.itemsize, memoryview(out.data)
        with meter(tensor.stage, len(left)), naming(tensor.path):
            descriptor = os.open(tensor.path, os.O_RDONLY)
            try:
                while left:
                    count = os.preadv(descriptor, [left], at)
                    if not count:
                        raise OSError(f"{tensor.path} has become shorter than its header says: it was changed while being read")
                    at, left = at + count, left[count:]
            finally:
                os.close(descriptor)
        return True

    def _map(self, first: int, count: int) -> np.ndarray:
        tensor = self.tensor
        start = tensor.offset + first * tensor.dtype.itemsize
        nbytes = count * tensor.dtype.itemsize
        with meter(self.tensor.stage, nbytes):
            descriptor = os.open(tensor.path, os.O_RDONLY)
            try:
                if os.fstat(descriptor).st_size < start + nbytes:
                    raise OSError(f"{tensor.path} has become shorter than its header says: it was changed while being read")
                return file_bytes(descriptor, tensor.path, start, start + nbytes).view(tensor.dtype)
            finally:
                os.close(descriptor)
