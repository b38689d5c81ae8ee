"""The metadata of scratch is what zarr itself writes, and zarr reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.model.dtypes import TABLE
from pipeline.sinks.zarr_files import array_attributes, read_attributes, write_array, write_group


@pytest.mark.parametrize("dtype", [row.numpy for row in TABLE], ids=str)
@pytest.mark.parametrize(("shape", "chunks"), [((5, 4), (2, 4)), ((3,), (3,)), ((2, 3, 4), (1, 3, 4))], ids=str)
def test_an_array_has_the_metadata_that_zarr_writes(
    dtype: np.dtype, shape: tuple[int, ...], chunks: tuple[int, ...], tmp_path: Path
) -> None:
    write_group(tmp_path / "ours", {"a": [1, "b"]})
    write_array(tmp_path / "ours" / "x.weight", shape, chunks, dtype, "from")
    group = zarr.create_group(tmp_path / "theirs", zarr_format=3, attributes={"a": [1, "b"]})
    stored = next(row.zarr for row in TABLE if row.numpy == dtype)
    attributes = array_attributes(shape, dtype, "from")
    options = {"compressors": None, "fill_value": 0, "config": {"write_empty_chunks": True}, "attributes": attributes}
    group.create_array("x.weight", shape=shape, chunks=chunks, dtype=stored, **options)
    for name in ("zarr.json", "x.weight/zarr.json"):
        ours, theirs = (json.loads((tmp_path / place / name).read_text()) for place in ("ours", "theirs"))
        assert ours == theirs
    assert {path.name for path in (tmp_path / "ours").rglob("*")} == {"zarr.json", "x.weight"}
    array = zarr.open_group(tmp_path / "ours", mode="r+")["x.weight"]
    values = np.arange(np.prod(shape)).astype(array.dtype).reshape(shape)
    array[...] = values
    assert np.array_equal(zarr.open_array(tmp_path / "ours" / "x.weight", mode="r")[...], values)


def test_a_group_s_attributes_are_replaced(tmp_path: Path) -> None:
    assert read_attributes(tmp_path / "x") == {}
    write_group(tmp_path / "x", {"complete": False})
    write_group(tmp_path / "x", {"complete": True})
    assert read_attributes(tmp_path / "x") == {"complete": True} == dict(zarr.open_group(tmp_path / "x", mode="r").attrs)
    (tmp_path / "x" / "zarr.json").write_text("{")
    assert read_attributes(tmp_path / "x") == {}
