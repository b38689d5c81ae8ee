"""The table of element types: safetensors names, NumPy types, TensorRT-LLM names, Zarr types.

bfloat16 and float8 are NumPy extension types from `ml_dtypes`. Zarr 3 stores neither, so their bit patterns are stored as
unsigned integers of the same width (`zarr`).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type under all of its names. `target`: TensorRT-LLM's, "" where none of its tensors has the type."""

    safetensors: str
    numpy: np.dtype
    target: str
    zarr: str


TABLE: tuple[DType, ...] = (
    DType("F64", np.dtype(np.float64), "", "float64"),
    DType("F32", np.dtype(np.float32), "float32", "float32"),
    DType("F16", np.dtype(np.float16), "float16", "float16"),
    DType("BF16", np.dtype(ml_dtypes.bfloat16), "bfloat16", "uint16"),
    DType("F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn), "fp8", "uint8"),
    DType("F8_E5M2", np.dtype(ml_dtypes.float8_e5m2), "", "uint8"),
    DType("F8_E8M0", np.dtype(ml_dtypes.float8_e8m0fnu), "", "uint8"),
    DType("I64", np.dtype(np.int64), "", "int64"),
    DType("I32", np.dtype(np.int32), "", "int32"),
    DType("I16", np.dtype(np.int16), "", "int16"),
    DType("I8", np.dtype(np.int8), "int8", "int8"),
    DType("U64", np.dtype(np.uint64), "", "uint64"),
    DType("U32", np.dtype(np.uint32), "", "uint32"),
    DType("U16", np.dtype(np.uint16), "", "uint16"),
    DType("U8", np.dtype(np.uint8), "uint8", "uint8"),
    DType("BOOL", np.dtype(np.bool_), "", "bool"),
)

BY_SAFETENSORS = {row.safetensors: row for row in TABLE}
BY_TARGET = {row.target: row for row in TABLE if row.target}
_BY_NUMPY = {row.numpy: row for row in TABLE}
NUMBERS = frozenset({"F64", "F32", "F16", "BF16"})  # the types, by safetensors' names, whose values are weights as they are
MODEL_DTYPES = ("bfloat16", "float16", "float32")  # the types that a model can compute in

# The order of tensors of different types in one file, as the safetensors library writes them: its type enumeration, reversed.
FILE_ORDER = (
    "U64",
    "I64",
    "F64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "I8",
    "U8",
    "BOOL",
)


def of_numpy(dtype: np.dtype) -> DType:
    """Return the table's row for a NumPy type. Raises KeyError for a type that no checkpoint holds."""
    return _BY_NUMPY[np.dtype(dtype)]


def auto_dtype(source: str | None) -> str:
    """Return the dtype that `--dtype auto` means: the source's; float16 for float32 or None.

    Facts: docs/format/checkpoint.md, section 5.
    """
    return "float16" if source in (None, "", "float32") else str(source)
