"""The metadata of Zarr groups and arrays on a local disk, as zarr.json files of format 3.

They are a few small files of JSON, written here as zarr writes them: importing it takes half a second of processor time.
Source: the Zarr core specification, version 3, "Group metadata" and "Array metadata".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.documents import read_json
from pipeline.errors import BadInput
from pipeline.model.dtypes import of_numpy
from pipeline.sinks.syncing import sync_directory, sync_files

METADATA = "zarr.json"


def write_group(directory: Path, attributes: Mapping[str, Any], sync: bool = False) -> None:
    """Make a group, or replace its metadata at one stroke; with `sync`, flush it to disk."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory, {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}, sync)


def read_attributes(directory: Path, surely: bool = False) -> dict[str, Any]:
    """Read the attributes of a group; none where there is no group.

    `surely`: raise OSError where the metadata is there and cannot be read; otherwise that is as good as none.
    """
    attributes = _read(directory, surely).get("attributes")
    return attributes if isinstance(attributes, dict) else {}


def has_metadata(directory: Path) -> bool:
    """Whether there is metadata of a group or an array: a power cut may leave an empty file."""
    return "node_type" in _read(directory)


def _read(directory: Path, surely: bool = False) -> dict[str, Any]:
    try:
        metadata = read_json(directory / METADATA)
    except (FileNotFoundError, NotADirectoryError, ValueError, BadInput):
        return {}
    except OSError:
        if surely:
            raise
        return {}
    return metadata if isinstance(metadata, dict) else {}


def array_attributes(shape: Sequence[int], dtype: np.dtype, source: str) -> dict[str, Any]:
    """The attributes of a tensor's array: its true dtype, as Zarr has no name for bfloat16 and float8, its source and its shape."""
    return {"dtype": of_numpy(dtype).safetensors, "source": source, "shape": list(shape)}


def write_array(directory: Path, shape: Sequence[int], chunk_shape: Sequence[int], dtype: np.dtype, source: str) -> None:
    """Make an array of uncompressed chunks, each a file of C-ordered little-endian values, bit patterns where Zarr knows no type.

    `shape`, `chunk_shape`: in elements. `source`: the path or URL that the tensor is from.
    """
    kind = of_numpy(dtype).zarr
    stored = np.dtype(kind)
    codec: dict[str, Any] = {"name": "bytes"}
    if stored.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    directory.mkdir(parents=True, exist_ok=True)
    _write(
        directory,
        {
            "shape": list(shape),
            "data_type": kind,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": stored.type(0).item(),
            "codecs": [codec],
            "attributes": array_attributes(shape, dtype, source),
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        },
    )


def _write(directory: Path, metadata: Mapping[str, Any], sync: bool = False) -> None:
    new = directory / f"{METADATA}.new"
    new.write_text(json.dumps(metadata, indent=2))
    if sync:
        sync_files([new])
    new.replace(directory / METADATA)
    if sync:
        sync_directory(directory)
