"""A chunk of scratch is used only if its bytes are those that were written, in whatever order they are read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.blocks import Part
from pipeline.tensor.placement import Region, slices, whole
from pipeline.tensor.settling import settling
from stages.read import scratch_chunks
from stages.read.mapped import MappedTensor
from stages.read.scratch_chunks import CheckedBlock, OpenChunk, ScratchChunk
from tests.support.examples import examples

SHAPE, STORED = (6, 4, 5), (7, 4, 5)  # a chunk at the edge is stored whole
VALUES = np.random.default_rng(7).integers(0, 1 << 16, STORED).astype(np.uint16)
SIZE = VALUES.nbytes


def stored(folder: Path, cuts: tuple[int, ...] = ()) -> tuple[Path, list[Part]]:
    """The file of a chunk, and its parts between some places."""
    path, data = folder / "chunk", VALUES.tobytes()
    path.write_bytes(data)
    bounds = [0, *sorted(cuts), SIZE]
    return path, [(a, b - a, xxhash.xxh3_64_hexdigest(data[a:b])) for a, b in pairwise(bounds) if a < b]


def opened(path: Path, parts: list[Part]) -> CheckedBlock:
    tensor = MappedTensor(str(path), 0, STORED, VALUES.dtype, "read_scratch")
    block = OpenChunk(ScratchChunk(str(path), tensor, whole(SHAPE)))({str(path): parts})
    assert isinstance(block, CheckedBlock)
    return block


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def spans(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda ends: (min(ends), max(ends)))


regions = st.tuples(*map(spans, SHAPE))


@given(
    st.lists(regions, max_size=5), st.sets(st.integers(1, SIZE - 1), max_size=3), st.integers(0, SIZE - 1), st.sampled_from([1, 64])
)
@examples(100)
def test_whatever_is_read_damage_is_seen_before_the_task_ends(
    tmp_path_factory: pytest.TempPathFactory, asked: list[Region], cuts: set[int], place: int, mapped: int
) -> None:
    path, parts = stored(tmp_path_factory.mktemp("x"), tuple(cuts))
    before, scratch_chunks.HASHED_BYTES = scratch_chunks.HASHED_BYTES, mapped
    try:
        with settling():
            block = opened(path, parts)
            for region in asked:
                assert np.array_equal(block.read(region), VALUES[slices(region)])
        damage(path, place)
        if asked:
            with pytest.raises(OSError, match="not those that were written"):
                read_all(opened(path, parts), asked)
            assert not path.exists()
    finally:
        scratch_chunks.HASHED_BYTES = before


def read_all(block: CheckedBlock, asked: list[Region]) -> None:
    with settling():
        for region in asked:
            block.read(region)


def test_rows_that_are_read_in_order_are_not_looked_at_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parts = stored(tmp_path)
    mapped: list[int] = []
    whole_map = scratch_chunks.PartSums._map
    monkeypatch.setattr(scratch_chunks.PartSums, "_map", lambda self, stop: (mapped.append(stop - self._at), whole_map(self, stop)))
    with settling():
        block = opened(path, parts)
        for row in range(SHAPE[0]):
            block.read(((row, row + 1), (0, 4), (0, 5)))
        block.read(((2, 3), (0, 4), (0, 5)))
    assert mapped == [SIZE // 7]  # the last row, which is stored and not read


def test_where_no_task_runs_a_chunk_is_checked_at_once(tmp_path: Path) -> None:
    path, parts = stored(tmp_path)
    damage(path, SIZE - 1)
    with pytest.raises(OSError, match="not those that were written"):
        opened(path, parts).read(((0, 1), (0, 4), (0, 5)))


def test_damage_tells_why_values_were_refused(tmp_path: Path) -> None:
    path, parts = stored(tmp_path)
    damage(path, 3)
    with pytest.raises(OSError, match="not those that were written"):
        refuse(opened(path, parts), BadInput([]))


def test_a_disk_that_fails_is_no_damage(tmp_path: Path) -> None:
    path, parts = stored(tmp_path)
    damage(path, 3)
    with pytest.raises(OSError, match="full"):
        refuse(opened(path, parts), OSError(28, "full"))
    assert path.exists()


def refuse(block: CheckedBlock, error: Exception) -> None:
    with settling():
        block.read(((0, 1), (0, 1), (0, 5)))
        raise error


@pytest.mark.parametrize("change", ["shorter", "gone", "unknown"])
def test_a_chunk_that_is_not_there_is_an_error_at_once(tmp_path: Path, change: str) -> None:
    path, parts = stored(tmp_path)
    if change == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "gone":
        path.unlink()
    else:
        parts = []
    with pytest.raises(OSError, match=r"not those|No such file|nobody has said"):
        read_all(opened(path, parts), [((0, 1), (0, 1), (0, 1))])
