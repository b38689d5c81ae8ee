"""GGUF's blocks as float32, by the package `gguf`; gguf_blocks.c is the same in C for the types that most files have."""

from __future__ import annotations

import numpy as np


def gguf_numbers(packed: np.ndarray, kind: str) -> np.ndarray:
    """float32 [..., elements] of rows of blocks uint8 [..., bytes]."""
    import gguf

    result: np.ndarray = gguf.quants.dequantize(np.ascontiguousarray(packed), gguf.GGMLQuantizationType[kind])
    return result
