"""GGUF's blocks as float32, by the package `gguf`; gguf_blocks.c is the same in C for the types that most files have."""

from __future__ import annotations

import numpy as np

from stages.quantization.kernels.casts import cast

FLOAT32 = np.dtype(np.float32)


def gguf_numbers(packed: np.ndarray, kind: str, to: np.dtype = FLOAT32) -> np.ndarray:
    """[..., elements] of rows of blocks uint8 [..., bytes]."""
    import gguf

    result: np.ndarray = gguf.quants.dequantize(np.ascontiguousarray(packed), gguf.GGMLQuantizationType[kind])
    return cast(result, to)
