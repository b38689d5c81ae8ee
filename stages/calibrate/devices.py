"""Tensors on the device that a calibration computes on, and from there to arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem


def device_of(name: str) -> torch.device:
    """A device by torch's name. Raises BadInput where there is none that computes."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).partition("\n")[0]
        expected = "cpu, or a device that torch has here, such as cuda"
        raise BadInput([Problem(f"--calibration_device {name}", f"none that torch computes on ({said})", expected)]) from None
    return device


def moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors in it on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    return {key: moved(each, device) for key, each in value.items()} if isinstance(value, dict) else value


def to_numpy(values: Tensor) -> np.ndarray:
    """The same as an array in main memory, bfloat16 included."""
    values = values.cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()
