"""Rank files, read by their format's description."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "U8": np.uint8,
}


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, of any type."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    result = {}
    for name, row in header.items():
        if name != "__metadata__":
            first, last = (8 + length + offset for offset in row["data_offsets"])
            result[name] = np.frombuffer(data[first:last], TYPES[row["dtype"]]).reshape(row["shape"])
    return result
