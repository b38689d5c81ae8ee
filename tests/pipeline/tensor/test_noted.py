"""Numbers that are noted while values are made: the same as made alone, and without reading anything again."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.phases import Store, group_blocks
from pipeline.tensor.noted import Noted, Notes, Noting, derive_noting
from pipeline.tensor.placement import NOWHERE, Region, extent, slices, whole
from pipeline.tensor.tensors import Block
from tests.support.examples import examples
from tests.support.packed_tensors import blocks, opened
from tests.support.strategies import regions

ROWS = 2  # of the source, for a row of values


class Counting(Block):
    """Rows in memory, and how many of their values were read."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype, self.count = values, values.shape, values.dtype, 0

    def read(self, region: Region) -> np.ndarray:
        part = self.values[slices(region)]
        self.count += part.size
        return part


def made(region: Region, source: Block) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows, one behind the other, negated; and the sum of each row."""
    *front, (first, last), (low, high) = region
    values = source.read((*front, (first * ROWS, last * ROWS), (0, source.shape[-1])))
    pairs = -values.reshape(*values.shape[:-2], last - first, -1)
    return pairs[..., low:high], values.sum(axis=-1, keepdims=True)


def alone(region: Region, source: Block) -> np.ndarray:
    return source.read((*region[:-1], (0, source.shape[-1]))).sum(axis=-1, keepdims=True)


NOTES = Notes(alone, np.dtype(np.int64), ROWS, 1)


def noting(source: Counting) -> tuple[Noting, Noted]:
    *front, rows, width = source.shape
    region = whole((*front, rows // ROWS, width * ROWS))
    values = Noting(region, source.dtype, made, {"source": source}, {}, NOTES)
    return values, Noted(values)


@pytest.mark.parametrize("front", [(), (3,)], ids=["matrix", "stack"])
@examples(60)
@given(data=st.data())
def test_whatever_was_read_before(front: tuple[int, ...], data: st.DataObject) -> None:
    source = Counting(np.arange(int(np.prod(front)) * 12 * 5).reshape(*front, 12, 5))
    values, numbers = noting(source)
    expected = source.values.sum(axis=-1, keepdims=True)
    for _ in range(data.draw(st.integers(0, 4))):
        region = data.draw(regions(values.shape))
        assert np.array_equal(values.read(region), -source.values.reshape(values.shape)[slices(region)])
        region = data.draw(regions(numbers.shape))
        assert np.array_equal(numbers.read(region), expected[slices(region)])


def test_nothing_is_read_again_and_what_was_noted_is_given_up_at_the_end() -> None:
    source = Counting(np.arange(60).reshape(12, 5))
    values, numbers = noting(source)
    for row in range(6):
        values.read(((row, row + 1), (0, 10)))
    assert source.count == 60
    for row in range(12):
        assert numbers.read(((row, row + 1), (0, 1))).tolist() == [[int(source.values[row].sum())]]
    assert source.count == 60
    numbers.read(whole(numbers.shape))
    assert source.count == 120, "made alone"


def test_in_another_process_the_numbers_are_made_alone() -> None:
    source = Counting(np.arange(60).reshape(12, 5))
    values, numbers = noting(source)
    values.read(whole(values.shape))
    other: Noted = pickle.loads(pickle.dumps(numbers))
    assert np.array_equal(other.read(whole(other.shape)), source.values.sum(axis=1, keepdims=True))
    assert source.count == 60


@pytest.mark.parametrize("front", [(), (2,)], ids=["matrix", "stack"])
def test_chunks_of_both_are_of_one_task(front: tuple[int, ...]) -> None:
    source = opened({"w": np.arange(int(np.prod(front)) * 24 * 5).reshape(*front, 24, 5)})["w"]
    rows = (1,) * front[0] if front else (5, 5, 2)
    values, numbers = derive_noting("noted", made, NOTES, {"source": source}, shape=(*front, 12, 10), dtype=source.dtype, rows=rows)
    assert numbers.shape == (*front, 24, 1)
    assert numbers.numblocks == values.numblocks
    of_values, of_numbers = (Store(name, (array,), (NOWHERE,), 8, 1, 960) for name, array in (("v", values), ("n", numbers)))
    groups = group_blocks((of_values, of_numbers), 400)
    assert [[store.name for store, _ in group] for group in groups] == [["v", "n"]] * len(rows)
    assert all(index == other for (_, index), (_, other) in groups)
    sums = np.arange(source.size).reshape(*front, 24, 5).sum(-1, keepdims=True)
    for block, region in zip(blocks(numbers.to_dask()), numbers.grid.regions.values(), strict=True):
        assert extent(region) == block.shape
        assert np.array_equal(block.read(whole(block.shape)), sums[slices(region)])
