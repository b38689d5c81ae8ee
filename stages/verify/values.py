"""Read arrays as torch tensors, also those of bfloat16 and float8, which NumPy knows through ml_dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import LazyTensor

_BITS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}


def to_torch(values: np.ndarray) -> torch.Tensor:
    """Copy an array to a torch tensor with the same values and the matching type."""
    bits = _BITS.get(values.dtype.name)
    if bits is None:
        return torch.from_numpy(np.array(values))
    return torch.from_numpy(np.ascontiguousarray(values).view(bits[0]).copy()).view(bits[1]).reshape(values.shape)


def read(tensor: LazyTensor, region: Region | None = None) -> torch.Tensor:
    """Read a region of a tensor, or all of it, in its own type. `region`: (start, stop) of each axis."""
    region = tuple((0, n) for n in tensor.shape) if region is None else region
    return to_torch(tensor.block(region).read(tuple((0, stop - start) for start, stop in region)))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute each operation in one thread, as the tasks themselves run at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
