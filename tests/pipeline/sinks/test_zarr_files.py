"""The metadata of scratch is what zarr itself writes, and zarr reads it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.model.dtypes import TABLE
from pipeline.sinks.chunk_sums import recorded_parts
from pipeline.sinks.remote import RemoteGroup
from pipeline.sinks.scratch_listing import list_scratch
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


HOSTILE = [
    "[" * 5_000,
    "[]",
    "5",
    '{"attributes": 5}',
    '{"attributes": {"headrace": "scratch"}}',
    '{"attributes": {"headrace": "scratch", "complete": "x", "stage": [], "id": {}, "xxh3": 5}}',
    '{"attributes": {"headrace": "scratch", "xxh3": {"a": [[1]]}}}',
    '{"attributes": {"headrace": "scratch", "xxh3": {"a": [["x", [], {}]]}}}',
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:60])
def test_metadata_that_nobody_writes_are_those_of_no_cut(text: str, tmp_path: Path) -> None:
    """Of a group on a disk and of one behind a URL."""
    (tmp_path / "x.zarr").mkdir()
    (tmp_path / "x.zarr" / "zarr.json").write_text(text)
    assert recorded_parts(read_attributes(tmp_path / "x.zarr")) == {}
    assert all(not cut.complete and cut.stage for cut in list_scratch(tmp_path))
    group = RemoteGroup(f"file://{tmp_path}/x.zarr", "read", "the id", "source", False, {})
    assert not group.complete
    assert group.recorded() == {}
    assert not group.kept


def test_metadata_that_are_larger_than_any_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "zarr.json").open("wb") as file:
        file.truncate(8 << 30)
    begun = time.process_time()
    assert read_attributes(tmp_path) == {}
    assert not RemoteGroup(f"file://{tmp_path}", "read", "the id", "source", False, {}).complete
    assert time.process_time() - begun < 2
