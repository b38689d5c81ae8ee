"""A tensor in a Zarr array on object storage, fetched chunk by chunk through zarr."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, shift, size, slices
from pipeline.tensor.tensors import Block


@dataclass(frozen=True)
class StoreTensor:
    """The Zarr array at `url`, whose elements are the bit patterns of `dtype`."""

    url: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stage: str = "read"  # that its bytes are metered as

    def block(self, region: Region) -> Block:
        return StoreBlock(self, region)


class StoreBlock(Block):
    """A region of a StoreTensor; nothing is fetched until `read` is called."""

    def __init__(self, tensor: StoreTensor, region: Region) -> None:
        self.tensor, self.region = tensor, region
        self.shape, self.dtype = extent(region), tensor.dtype

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`, relative to the block. Raises OSError where the store cannot be read."""
        import zarr

        in_array = shift(region, [start for start, _ in self.region])
        with meter(self.tensor.stage, size(region) * self.dtype.itemsize):
            bits = np.asarray(zarr.open_array(self.tensor.url, mode="r")[slices(in_array)])
            return bits.view(self.dtype)
