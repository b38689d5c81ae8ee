"""Parts of rank files: of one size and few enough, and runs of elements as regions that tile them in order."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.rank_parts import MOST_PARTS, MOST_TASKS, PART_BYTES, boxes, part_bytes
from pipeline.tensor.placement import contiguous, slices


@given(st.integers(1, 1 << 45), st.integers(1, 64))
def test_parts_are_of_one_size_and_few_enough(file_bytes: int, ranks: int) -> None:
    size = part_bytes(file_bytes, file_bytes * ranks)
    assert -(-file_bytes // size) <= MOST_PARTS
    assert file_bytes * ranks <= size * MOST_TASKS
    assert size % (1 << 20) == 0
    assert size >= PART_BYTES >= 5 << 20


def test_a_large_model_has_larger_parts() -> None:
    assert [part_bytes(total // 8, total) >> 20 for total in (16 * 10**9, 141 * 10**9, 810 * 10**9)] == [16, 16, 64]


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_regions_of_a_run_are_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    values = np.arange(count).reshape(shape)
    found = list(boxes(shape, first, last))
    assert all(len(list(contiguous(shape, box))) == 1 for box in found), "each is one run"
    elements = [int(each) for box in found for each in np.asarray(values[slices(box)]).reshape(-1)]
    assert elements == list(range(first, last))
