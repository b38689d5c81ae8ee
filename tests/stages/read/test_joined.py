"""A tensor joined of parts is NumPy's concatenation of them, and reads no part that a region does not touch."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.dtypes import BY_SAFETENSORS
from pipeline.tensor.placement import Region, extent, slices, whole
from pipeline.tensor.tensors import Block
from stages.read import read
from stages.read.joined import JoinedTensor
from stages.read.mapped import MappedTensor
from tests.support.examples import examples
from tests.support.lazy import Held, values
from tests.support.strategies import regions, shapes


def cut(array: np.ndarray, axis: int, at: list[int]) -> JoinedTensor:
    return JoinedTensor(tuple(Held(part) for part in np.split(array, at, axis)), axis)


def numbered(shape: tuple[int, ...], kind: str = "I32") -> np.ndarray:
    """An array in which no two elements are alike, whatever is read of it."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(BY_SAFETENSORS[kind].numpy)


@st.composite
def splits(draw: st.DrawFn, least: int = 1) -> tuple[tuple[int, ...], int, list[int]]:
    """A shape, one of its axes, and where that is cut: parts may be of any lengths, of none too."""
    shape = draw(shapes(longest=7))
    axis = draw(st.integers(0, len(shape) - 1))
    return shape, axis, sorted(draw(st.lists(st.integers(0, shape[axis]), min_size=least - 1, max_size=5)))


@examples(200)
@given(st.data(), splits(), st.sampled_from(["I32", "BF16", "U8"]), st.sampled_from([0, 1]))
def test_any_region_is_that_of_the_whole(
    data: st.DataObject, split: tuple[tuple[int, ...], int, list[int]], kind: str, least: int
) -> None:
    shape, axis, at = split
    array = numbered(shape, kind)
    tensor = cut(array, axis, at)
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
    outer = data.draw(regions(shape, least))
    inner = data.draw(regions(extent(outer), least))
    block = tensor.block(outer)
    expected = array[slices(outer)]
    assert (block.shape, block.dtype) == (expected.shape, expected.dtype)
    for found, wanted in (
        (np.asarray(block), expected),
        (block.read(inner), expected[slices(inner)]),
        (np.asarray(block[slices(inner)]), expected[slices(inner)]),
    ):
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


@examples(100)
@given(st.data(), splits())
def test_what_lies_within_a_region_tiles_it(data: st.DataObject, split: tuple[tuple[int, ...], int, list[int]]) -> None:
    shape, axis, at = split
    tensor = cut(numbered(shape), axis, at)
    region = data.draw(regions(shape))
    covered = np.zeros(shape, int)
    for part, inside, place in tensor.within(region):
        assert extent(inside) == extent(place)
        assert all(0 <= start < stop <= size for (start, stop), size in zip(inside, part.shape, strict=True))
        covered[slices(place)] += 1
    expected = np.zeros(shape, int)
    expected[slices(region)] = 1
    np.testing.assert_array_equal(covered, expected)


@examples(50)
@given(splits(), st.integers(1, 100), st.sampled_from([1, 4]))
def test_dask_arrays_of_it_hold_the_whole(split: tuple[tuple[int, ...], int, list[int]], limit: int, multiple: int) -> None:
    shape, axis, at = split
    array = numbered(shape)
    lazy = read({"t": cut(array, axis, at)}, limit, multiple)["t"]
    np.testing.assert_array_equal(values(lazy), array)


@examples(50)
@given(st.data(), splits(least=3))
def test_joined_tensors_can_be_joined(data: st.DataObject, split: tuple[tuple[int, ...], int, list[int]]) -> None:
    shape, axis, at = split
    array = numbered(shape)
    first, *rest = cut(array, axis, at).parts
    tensor = JoinedTensor((first, JoinedTensor(tuple(rest), axis)), axis)
    region = data.draw(regions(shape))
    np.testing.assert_array_equal(np.asarray(tensor.block(region)), array[slices(region)])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("region", "copied"),
    [
        (((4, 8), (4, 8)), False),
        (((5, 6), (5, 7)), False),
        (((0, 4), (0, 4)), False),
        (((3, 5), (3, 5)), True),
        (((0, 12), (0, 12)), True),
    ],
)
def test_a_region_in_one_part_is_not_copied(region: Region, copied: bool, axis: int) -> None:
    array = numbered((12, 12))
    tensor = cut(array, axis, [4, 8])
    found = tensor.block(whole(tensor.shape)).read(region)
    assert np.shares_memory(found, array) is not copied
    np.testing.assert_array_equal(found, array[slices(region)])


def test_only_the_parts_that_a_region_touches_are_read() -> None:
    read_of: list[tuple[str, Region]] = []

    class Watched(Held):
        def block(self, region: Region) -> Block:
            read_of.append((str(self.values[0, 0]), region))
            return super().block(region)

    array = numbered((9, 4))
    tensor = JoinedTensor(tuple(Watched(part) for part in np.split(array, 3)), 0)
    block = tensor.block(((1, 9), (1, 4)))
    assert not read_of, "nothing is read until a region is asked for"
    np.testing.assert_array_equal(block.read(((1, 4), (0, 2))), array[2:5, 1:3])
    assert read_of == [("0", ((2, 3), (1, 3))), ("12", ((0, 2), (1, 3)))]


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_in_files_survive_pickling(axis: int, tmp_path: Path) -> None:
    array = numbered((6, 8), "BF16")
    parts = []
    for number, part in enumerate(np.split(array, 2, axis)):
        (tmp_path / str(number)).write_bytes(np.ascontiguousarray(part).tobytes())
        parts.append(MappedTensor(str(tmp_path / str(number)), 0, part.shape, part.dtype))
    tensor = pickle.loads(pickle.dumps(JoinedTensor(tuple(parts), axis)))
    region = ((1, 5), (2, 7))
    assert np.asarray(tensor.block(region)).tobytes() == array[slices(region)].tobytes()


def test_a_part_that_became_shorter_is_an_os_error() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(11))
        file.flush()
        whole_, short = (MappedTensor(file.name, 0, (n,), np.dtype(np.uint8)) for n in (11, 12))
        with pytest.raises(OSError, match="shorter"):
            np.asarray(JoinedTensor((whole_, short), 0).block(((0, 23),)))
