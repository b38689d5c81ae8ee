"""Arrays as torch tensors: bfloat16 and float8 too, which NumPy has from ml_dtypes alone."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import LazyTensor

_BITS = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}


def to_torch(values: np.ndarray) -> torch.Tensor:
    """A copy of an array with the same values, of torch's type for them."""
    bits = _BITS.get(values.dtype.name)
    if bits is None:
        return torch.from_numpy(np.array(values))
    return torch.from_numpy(np.ascontiguousarray(values).view(bits[0]).copy()).view(bits[1]).reshape(values.shape)


def read(tensor: LazyTensor, region: Region | None = None) -> torch.Tensor:
    """A region of a tensor, or all of it, in its own type."""
    region = tuple((0, n) for n in tensor.shape) if region is None else region
    return to_torch(tensor.block(region).read(tuple((0, stop - start) for start, stop in region)))
