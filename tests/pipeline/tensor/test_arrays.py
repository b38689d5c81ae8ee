"""Arrays of blocks: as Dask arrays and by their small tasks they are the same; arrays of other making are followed."""

from __future__ import annotations

import pickle

import dask
import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Task
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.arrays import BlockArray, DaskBlocks, Needed, block_array
from pipeline.tensor.blocks import read_block
from pipeline.tensor.derived import constant, derive
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.rows import take_rows
from pipeline.tensor.tensors import Applied, Block, map_blocks
from stages.read import read
from tests.support.lazy import HeldBlock, held, values

INT64 = np.dtype(np.int64)


def numbers(rows: int, columns: int) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)


def source(rows: int = 6, columns: int = 4, at_once: int = 2) -> BlockArray:
    return read(held({"a": numbers(rows, columns)}), at_once * columns * 8, 1)["a"]


def doubled(block: Block) -> Block:
    return Applied(block, lambda part: part * 2, stage="test", dtype=INT64)


def both(region: Region, one: Block, other: Block, times: int) -> np.ndarray:
    return np.asarray(one.read(region)) * times + np.asarray(other.read(region))


def summed(times: int = 10) -> BlockArray:
    one = source()
    return derive(
        "test",
        both,
        {"one": one, "other": map_blocks(one, doubled, dtype=INT64)},
        shape=(6, 4),
        dtype=INT64,
        rows=(3, 3),
        times=times,
    )


def as_blocks(array: BlockArray) -> np.ndarray:
    """The values by small tasks, as a group of blocks makes them."""
    result = np.empty(array.shape, dtype=array.dtype)
    for index, region in array.grid.regions.items():
        result[tuple(slice(*interval) for interval in region)] = np.asarray(read_block(array, index))
    return result


def test_an_array_says_of_itself_what_dask_says() -> None:
    for array in (source(), summed(), take_rows(source(), [(1, 3), (5, 6)], 0), constant("c", (1.0, 2.0))):
        dasks = array.to_dask()
        for name in ("name", "shape", "chunks", "dtype", "numblocks", "npartitions", "chunksize", "ndim", "size", "nbytes"):
            assert getattr(array, name) == getattr(dasks, name), name


def test_its_graph_and_its_small_tasks_make_the_same() -> None:
    expected = 10 * numbers(6, 4) + 2 * numbers(6, 4)
    array = summed()
    assert np.array_equal(values(array), expected)
    assert np.array_equal(as_blocks(array), expected)
    layers = array.dask.layers
    assert len(layers) == 3
    assert array.dask.dependencies[array.name] == {array.inputs[0].name, array.inputs[1].name}
    # Dask's own slicing of blocks, and its scheduler.
    (part,) = dask.compute(array.to_dask()[1:2], scheduler="synchronous")
    assert np.array_equal(part, expected[1:2])


def test_small_tasks_have_sources_first_and_are_made_once() -> None:
    array, needed = summed(), Needed()
    last = [array.collect(index, needed) for index in array.grid.regions]
    tasks = [task for task, _ in needed.values()]
    assert [task.number for task in tasks] == list(range(len(tasks)))
    assert all(need < task.number for task in tasks for need in task.needs)
    assert len(tasks) == 3 + 3 + 2
    assert [array.collect(index, needed) for index in array.grid.regions] == last
    again = pickle.loads(pickle.dumps(tasks[0]))
    assert np.array_equal(np.asarray(again.make()), numbers(6, 4)[:2])


def test_arrays_of_equal_values_are_equal_and_others_are_not() -> None:
    one = source()

    def made(times: int) -> BlockArray:
        return derive("test", both, {"one": one, "other": one}, shape=(6, 4), dtype=INT64, times=times)

    assert made(2) == made(2)
    assert hash(made(2)) == hash(made(2))
    assert made(2).name == made(2).name
    assert made(2) != made(3)
    assert made(2).name != made(3).name
    assert map_blocks(one, doubled, dtype=INT64) == map_blocks(one, doubled, dtype=INT64)
    assert one != source()  # two sources may have one name
    assert len({made(2), made(2), made(3)}) == 2


def test_what_is_read_is_found_without_making_blocks_in_between() -> None:
    array, found, seen = summed(), {}, set()
    for index in array.grid.regions:
        array.sources(index, found, seen)
    assert len(found) == 3
    assert {make.region for make in found.values()} == {((n, n + 2), (0, 4)) for n in (0, 2, 4)}


@given(st.data())
def test_rows_of_an_array_are_the_rows_of_its_values(data: st.DataObject) -> None:
    rows, axis = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 1))
    array = source(rows, 5, data.draw(st.integers(1, rows)))
    edges = sorted(data.draw(st.sets(st.integers(0, array.shape[axis]), min_size=2, max_size=6)))
    intervals = list(zip(edges[::2], edges[1::2], strict=False))
    taken = take_rows(array, intervals, axis)
    expected = np.concatenate([np.take(numbers(rows, 5), range(*interval), axis) for interval in intervals], axis)
    assert np.array_equal(as_blocks(taken), expected)
    assert np.array_equal(values(taken), expected)


def foreign() -> da.Array:
    """A Dask array of blocks that another package made of nothing of ours."""
    graph = {("zeros", 0, 0): Task(("zeros", 0, 0), HeldBlock, np.full((6, 4), 7), whole((6, 4)))}
    return da.Array(graph, "zeros", chunks=((6,), (4,)), meta=np.empty((0, 0), dtype=np.int64))


def test_a_dask_array_of_blocks_is_taken() -> None:
    array = derive("test", both, {"one": foreign(), "other": source()}, shape=(6, 4), dtype=INT64, times=1)
    assert np.array_equal(as_blocks(array), 7 + numbers(6, 4))
    assert np.array_equal(values(array), 7 + numbers(6, 4))
    assert np.array_equal(values(map_blocks(foreign(), doubled, dtype=INT64)), np.full((6, 4), 14))


def test_a_slice_keeps_what_it_is_made_of() -> None:
    """A slice goes through Dask, and its sources are still seen, of the stage that reads."""
    array = source()
    array.stage = "read"
    part = array[1:3]
    assert isinstance(part, DaskBlocks)
    part.stage = "unpack"
    assert np.array_equal(as_blocks(part), numbers(6, 4)[1:3])
    needed: Needed = {}
    for index in part.grid.regions:
        part.collect(index, needed)
    assert [stage for _, stage in needed.values()].count("read") == 2
    found, seen = {}, set()
    for index in part.grid.regions:
        part.sources(index, found, seen)
    assert {make.region for make in found.values()} == {((0, 2), (0, 4)), ((2, 4), (0, 4))}


@pytest.mark.parametrize("array", [source(), foreign()], ids=["ours", "dask"])
def test_an_array_is_wrapped_once(array: BlockArray | da.Array) -> None:
    wrapped = block_array(array)
    assert block_array(wrapped) is wrapped
    assert wrapped.name == array.name
