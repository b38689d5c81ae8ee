"""Reduced arrays: made once for all who read them in one task, which is the task of all that take them."""

from __future__ import annotations

import pickle

import numpy as np

from pipeline.planning.phases import Store, group_blocks
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.blocks import read_block
from pipeline.tensor.derived import derive
from pipeline.tensor.placement import NOWHERE, Region, whole
from pipeline.tensor.reduced import Reduced, reduce
from pipeline.tensor.tensors import Block
from tests.support.lazy import block
from tests.support.packed_tensors import opened

FLOAT = np.dtype(np.float32)
made: list[Region] = []


def largest(region: Region, **sources: Block) -> np.ndarray:
    made.append(region)
    return np.maximum.reduce([np.abs(np.asarray(each.read(whole(each.shape)))).max(axis=0) for each in sources.values()])


def by_largest(region: Region, source: Block, most: Block) -> np.ndarray:
    return np.asarray(source.read(region)) / np.asarray(most.read((region[1],)))


def arrays(chunk: int = 64) -> tuple[dict[str, np.ndarray], dict[str, BlockArray]]:
    """Two matrices by the largest magnitudes of their columns, and one that is alone, in blocks of a few rows."""
    random = np.random.default_rng(0)
    given = {name: random.normal(size=(12, 4)).astype(FLOAT) for name in ("a", "other", "b")}
    lazy = opened(given, chunk)
    most = reduce("most", largest, {"first": lazy["a"], "second": lazy["b"]}, shape=(4,), dtype=FLOAT)
    for name in ("a", "b"):
        inputs = {"source": lazy[name], "most": most}
        lazy[name] = derive("divided", by_largest, inputs, shape=(12, 4), dtype=FLOAT, rows=lazy[name].chunks[0])
    return given, lazy


def test_it_is_made_once_for_a_block() -> None:
    given, lazy = arrays(1 << 10)
    made.clear()
    found = read_block(lazy["a"], (0, 0))
    parts = [np.asarray(found.read(((row, row + 1), (0, 4)))) for row in range(12)]
    expected = given["a"] / np.maximum(np.abs(given["a"]).max(axis=0), np.abs(given["b"]).max(axis=0))
    assert np.array_equal(np.concatenate(parts), expected)
    assert made == [((0, 4),)]


def test_it_travels_without_what_it_keeps() -> None:
    kept = Reduced(block(np.arange(4, dtype=FLOAT)))
    kept.read(((0, 4),))
    again = pickle.loads(pickle.dumps(kept))
    assert np.array_equal(again.read(((1, 3),)), [1, 2])
    assert len(pickle.dumps(kept)) == len(pickle.dumps(again))


def test_all_that_takes_it_is_of_one_task() -> None:
    _, lazy = arrays()
    stores = [Store(name, (array,), (NOWHERE,), 4, 1, int(array.nbytes)) for name, array in lazy.items()]
    groups = group_blocks(stores, 64)
    owners = {store.name: {number for number, group in enumerate(groups) for each, _ in group if each is store} for store in stores}
    assert owners["a"] == owners["b"]
    assert len(owners["a"]) == 1
    assert len(owners["other"]) == 3, "the others are divided as ever"
    blocks = [(store.name, index) for group in groups for store, index in group]
    assert sorted(blocks) == sorted((name, index) for name, array in lazy.items() for index in array.grid.regions)
