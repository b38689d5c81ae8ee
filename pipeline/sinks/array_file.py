"""Small safetensors files, written whole: of arrays in memory, under their names when they are on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.model.dtypes import of_numpy
from pipeline.sinks.syncing import sync_directory, sync_files
from pipeline.tensor.system_errors import naming


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file in the place of what is there, at one stroke. `metadata`: texts for the header. Raises OSError, naming it."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, values in sorted(arrays.items()):
        kind, ends = of_numpy(values.dtype).safetensors, [at, at + values.nbytes]
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": ends}
        at += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with naming(partial):
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, values in sorted(arrays.items()):
                file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        sync_files([partial])
        partial.replace(path)
        sync_directory(path.parent)
