"""Regions are arithmetic on integers: every law is checked against NumPy's own indexing."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tensor.placement import Region, extent, intersect, pieces, runs, shift, size, slices, whole
from tests.support.examples import examples
from tests.support.strategies import regions, shapes

Case = tuple[tuple[int, ...], Region]
cases = shapes(longest=12).flatmap(lambda shape: st.tuples(st.just(shape), regions(shape)))
pairs = shapes().flatmap(lambda shape: st.tuples(st.just(shape), regions(shape), regions(shape)))


# Limits small enough that most regions are cut.
limits, multiples = st.integers(1, 60), st.sampled_from([1, 2, 3])
cutting = given(cases, st.sampled_from([1, 2, 4]), limits, multiples)


def mask(shape: tuple[int, ...], region: Region) -> np.ndarray:
    result = np.zeros(shape, dtype=bool)
    result[slices(region)] = True
    return result


@given(cases)
def test_extent_size_and_whole_are_those_of_the_indexed_array(case: Case) -> None:
    shape, region = case
    part = np.empty(shape)[slices(region)]
    assert extent(region) == part.shape
    assert size(region) == part.size
    assert mask(shape, whole(shape)).all()


@given(pairs)
def test_intersect_is_what_both_regions_cover(case: tuple[tuple[int, ...], Region, Region]) -> None:
    shape, a, b = case
    common = mask(shape, a) & mask(shape, b)
    found = intersect(a, b)
    assert (found is None) == (not common.any())
    assert found is None or (mask(shape, found) == common).all()
    assert found == intersect(b, a)
    assert intersect(a, a) == a


@given(cases, st.lists(st.integers(-5, 5), min_size=3, max_size=3))
def test_shift_moves_and_moves_back(case: Case, by: list[int]) -> None:
    _, region = case
    by = by[: len(region)]
    moved = shift(region, by)
    assert [start for start, _ in moved] == [start + n for (start, _), n in zip(region, by, strict=True)]
    assert extent(moved) == extent(region)
    assert shift(moved, by, -1) == region


@examples(300)
@cutting
def test_pieces_tile_a_region_in_order(case: Case, itemsize: int, limit: int, multiple: int) -> None:
    shape, region = case
    elements = np.arange(size(region)).reshape(extent(region))
    grid = np.full(shape, -1)
    grid[slices(region)] = elements
    # One after another, the pieces give every element of the region once, in C order: no gap, no overlap, each contiguous in it.
    found = [grid[slices(piece)].ravel() for piece in pieces(region, itemsize, limit, multiple)]
    assert np.concatenate(found).tolist() == elements.ravel().tolist()


@examples(300)
@cutting
def test_pieces_obey_the_limit_down_to_one_group_of_rows(case: Case, itemsize: int, limit: int, multiple: int) -> None:
    _, region = case
    *_, height, width = (1, *extent(region))
    for piece in pieces(region, itemsize, limit, multiple):
        *stack, rows, columns = (1, *extent(piece))
        # What is cut last: the rows of a matrix, or the elements of a vector.
        group = rows if height > 1 else columns
        assert size(piece) * itemsize <= limit or (math.prod(stack) == 1 and group <= multiple)
        assert height == 1 or columns == width


@examples(300)
@cutting
def test_pieces_cut_rows_at_multiples(case: Case, itemsize: int, limit: int, multiple: int) -> None:
    _, region = case
    axis = max(len(region) - 2, 0)
    start, stop = region[axis]
    for piece in pieces(region, itemsize, limit, multiple):
        first, last = piece[axis]
        assert (first - start) % multiple == 0
        assert (last - start) % multiple == 0 or last == stop


def test_pieces_of_an_empty_region_hold_nothing() -> None:
    assert sum(map(size, pieces(((0, 0), (0, 4)), 2, 1))) == 0


@given(cases)
def test_runs_cover_a_region_exactly(case: Case) -> None:
    shape, region = case
    flat = np.arange(math.prod(shape)).reshape(shape)[slices(region)]
    seen: list[int] = []
    for first, index, length in runs(shape, region):
        run = list(range(first, first + length))
        assert flat[index].ravel().tolist() == run
        seen += run
    assert seen == flat.ravel().tolist()


@given(shapes().flatmap(lambda shape: st.tuples(st.just(shape), regions(shape[:1]))))
def test_whole_rows_are_one_run(case: Case) -> None:
    shape, rows = case
    assert len(list(runs(shape, (*rows, *whole(shape[1:]))))) == 1
