"""Files that torch.save writes, in both of its formats, tensors of random bits, and their comparison with those read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import LazyTensor

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path: Path, value: Any, *, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, 0 and 1 for booleans."""
    count = math.prod(shape) * dtype.itemsize
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, dtype=np.uint8)
    return torch.from_numpy(bits).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's values in C order as torch has them."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def check(found: LazyTensor, expected: torch.Tensor) -> None:
    assert found.shape == tuple(expected.shape)
    assert f"torch.{found.dtype.name}" == str(expected.dtype)
    assert np.asarray(found.block(whole(found.shape))).tobytes() == bits(expected)
