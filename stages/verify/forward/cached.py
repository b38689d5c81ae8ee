"""Keys and values as a cache of 8 bits holds them for the tokens that follow; those of a step itself are not rounded.

Facts: docs/format/quantized-layouts.md, section 4e.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_FLOAT8 = 448.0


def as_cached(values: Tensor, kind: str, scale: float) -> Tensor:
    """Values of any shape, as their codes in a cache stand for them. `kind`: "INT8", "FP8", or another for no codes."""
    if kind == "INT8":
        return (values / scale).round().clamp(-128, 127) * scale
    if kind == "FP8":
        return (values / scale).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float() * scale
    return values
