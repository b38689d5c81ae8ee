"""Arrays as torch's tensors, which the forward pass computes with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import LazyTensor
from stages.verify.values import read

# The types that NumPy knows through ml_dtypes: by bits that both know.
_BITS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}


def to_torch(values: np.ndarray) -> Tensor:
    """Copy an array to a tensor with the same values and the matching type."""
    bits = _BITS.get(values.dtype.name)
    if bits is None:
        return torch.from_numpy(np.array(values))
    return torch.from_numpy(np.array(values.view(bits[0]))).view(bits[1])


def read_tensor(tensor: LazyTensor, region: Region | None = None) -> Tensor:
    """Read a region of a stored tensor, or all of it, in its own type. `region`: (start, stop) of each axis."""
    return to_torch(read(tensor, region))
