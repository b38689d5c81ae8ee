"""The closed list of operations that a family's rename row may name.

Each maps whole periods of rows (axis `out`) to the same rows, so that it runs block by block, and has an inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


def unpermute_rope(values: np.ndarray, period: int) -> np.ndarray:
    """Undo the interleaving of a head's rotary halves: rows (i, half) of each head become (half, i).

    `values`: [n * period, ...], `period` = head_size. Meta's checkpoints and llama.cpp interleave; Hugging Face and
    TensorRT-LLM (rope_gpt_neox) do not.
    """
    heads = values.reshape(-1, period // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def permute_rope(values: np.ndarray, period: int) -> np.ndarray:
    """The inverse of `unpermute_rope`: rows (half, i) of each head become (i, half)."""
    heads = values.reshape(-1, 2, period // 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


@dataclass(frozen=True)
class Operation:
    """An operation and its inverse: functions of (values [rows, ...], period)."""

    forward: Callable[[np.ndarray, int], np.ndarray]
    inverse: Callable[[np.ndarray, int], np.ndarray]


OPERATIONS: Mapping[str, Operation] = {
    "unpermute_rope": Operation(unpermute_rope, permute_rope),
}
