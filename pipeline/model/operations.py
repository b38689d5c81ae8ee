"""The closed list of operations that a family's rename row may name.

Each maps whole periods of rows (axis `out`) to the same rows, so that it runs block by block, and has an inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
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


def wide(dtype: np.dtype) -> np.dtype:
    """The type that the reference adds in: float32 for bfloat16, otherwise the values' own."""
    return np.dtype(np.float32) if dtype == ml_dtypes.bfloat16 else dtype


def add_one(values: np.ndarray, period: int) -> np.ndarray:  # noqa: ARG001
    """Each value plus 1: Gemma's norms multiply by 1 + weight, TensorRT-LLM's by the weight.

    bfloat16 is added in float32, so that the sum is rounded once, by the cast; float16 is added, and rounded, in float16.
    """
    with np.errstate(invalid="ignore"):
        result: np.ndarray = np.add(values, 1, dtype=wide(values.dtype))
    return result


def subtract_one(values: np.ndarray, period: int) -> np.ndarray:  # noqa: ARG001
    """The inverse of `add_one`, but for what its addition rounds off."""
    result: np.ndarray = np.subtract(values, 1, dtype=values.dtype)
    return result


def same(dtype: np.dtype) -> np.dtype:
    """The type of an operation that only moves values."""
    return dtype


@dataclass(frozen=True)
class Operation:
    """An operation and its inverse: functions of (values [rows, ...], period); and the type of its result."""

    forward: Callable[[np.ndarray, int], np.ndarray]
    inverse: Callable[[np.ndarray, int], np.ndarray]
    dtype: Callable[[np.dtype], np.dtype] = same


OPERATIONS: Mapping[str, Operation] = {
    "unpermute_rope": Operation(unpermute_rope, permute_rope),
    "add_one": Operation(add_one, subtract_one, wide),
}
