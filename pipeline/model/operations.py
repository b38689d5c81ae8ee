"""The operations on values that a family's rename row may name; there are no others.

Each maps rows (axis `out`) in whole periods to as many rows, so that it can run block by block, and has an inverse or changes
nothing the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np


def unpermute_rope(values: np.ndarray, period: int) -> np.ndarray:
    """Undo the interleaving of a head's rotary halves: rows ordered (i, half) within each head become (half, i).

    `values`: [n * period, ...] of any dtype, with `period` = head_size. Meta's checkpoints and llama.cpp interleave; Hugging Face
    and TensorRT-LLM (rope_gpt_neox) do not.
    """
    heads = values.reshape(-1, period // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def permute_rope(values: np.ndarray, period: int) -> np.ndarray:
    """Invert `unpermute_rope`: rows ordered (half, i) within each head become (i, half)."""
    heads = values.reshape(-1, 2, period // 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def wide(dtype: np.dtype) -> np.dtype:
    """Return the type in which the reference implementation adds: float32 for bfloat16, otherwise `dtype` itself."""
    return np.dtype(np.float32) if dtype == ml_dtypes.bfloat16 else dtype


def add_one(values: np.ndarray, period: int) -> np.ndarray:  # noqa: ARG001
    """Add 1 to each value: Gemma's norms multiply by 1 + weight, TensorRT-LLM's by the weight.

    bfloat16 is added in float32 and returned as float32, so that the sum is rounded only once, by the later cast; float16 is added
    and rounded in float16.
    """
    with np.errstate(invalid="ignore"):
        result: np.ndarray = np.add(values, 1, dtype=wide(values.dtype))
    return result


def subtract_one(values: np.ndarray, period: int) -> np.ndarray:  # noqa: ARG001
    """Invert `add_one`, except for what its addition rounded off."""
    result: np.ndarray = np.subtract(values, 1, dtype=values.dtype)
    return result


def normalize_rows(values: np.ndarray, period: int) -> np.ndarray:  # noqa: ARG001
    """Divide each row by its length: a head that is normalized whenever it is used, as Baichuan 2's, made a plain one.

    `values`: [rows, in], whole rows, of any float dtype; returned as float32, so that they are rounded only once, by the later
    cast. A row of zeros stays.
    """
    wide_values = values.astype(np.float32)
    lengths = np.sqrt(np.square(wide_values).sum(-1, keepdims=True))
    result: np.ndarray = wide_values / np.maximum(lengths, np.float32(1e-12))
    return result


def float32(dtype: np.dtype) -> np.dtype:  # noqa: ARG001
    """Return float32, whatever the dtype was."""
    return np.dtype(np.float32)


def same(dtype: np.dtype) -> np.dtype:
    """Return `dtype`: the result type of an operation that only moves values."""
    return dtype


@dataclass(frozen=True)
class Operation:
    """An operation and its inverse, functions of (values [rows, ...], period); `dtype` maps the input's type to the result's.

    `inverse`: None for an operation that loses something, and changes its own results no more. `rows`: it needs whole rows.
    """

    forward: Callable[[np.ndarray, int], np.ndarray]
    inverse: Callable[[np.ndarray, int], np.ndarray] | None
    dtype: Callable[[np.dtype], np.dtype] = same
    rows: bool = False


OPERATIONS: Mapping[str, Operation] = {
    "unpermute_rope": Operation(unpermute_rope, permute_rope),
    "add_one": Operation(add_one, subtract_one, wide),
    "normalize_rows": Operation(normalize_rows, None, float32, rows=True),
}
