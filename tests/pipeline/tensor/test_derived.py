"""Derived blocks: rows that are kept for the next reading are those of one thread, and do not travel."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np

from pipeline.tensor.derived import Derived, derive
from pipeline.tensor.placement import Region, slices
from pipeline.tensor.tensors import Block
from tests.support.lazy import values
from tests.support.packed_tensors import opened

VALUES = np.arange(4096, dtype=np.int32).reshape(512, 8)


def make(region: Region) -> np.ndarray:
    return VALUES[slices(region)].copy()


def block() -> Derived:
    return Derived(((0, 512), (0, 8)), np.dtype(np.int32), make, {}, {}, ahead=64)


def test_two_threads_read_what_is_theirs() -> None:
    shared, wrong = block(), []

    def read(order: range) -> None:
        for _ in range(20):
            for first in order:
                region = ((first, first + 8), (0, 8))
                if not np.array_equal(shared.read(region), VALUES[slices(region)]):
                    wrong.append(region)

    threads = [threading.Thread(target=read, args=(order,)) for order in (range(0, 512, 8), range(504, -1, -8), range(0, 512, 16))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_are_made_once_for_the_next_readings() -> None:
    made: list[Region] = []

    def counted(region: Region) -> np.ndarray:
        made.append(region)
        return make(region)

    one = Derived(((0, 512), (0, 8)), np.dtype(np.int32), counted, {}, {}, ahead=64)
    for first in range(0, 512, 8):
        one.read(((first, first + 8), (0, 8)))
    assert [rows for rows, _ in made] == [(first, first + 64) for first in range(0, 512, 64)]


def test_what_is_kept_does_not_travel() -> None:
    one = block()
    one.read(((0, 8), (0, 8)))
    assert len(pickle.dumps(one)) < 2000
    again = pickle.loads(pickle.dumps(one))
    assert np.array_equal(again.read(((8, 16), (0, 8))), VALUES[8:16])


def doubled(region: Region, given: Block) -> np.ndarray:
    return 2 * np.asarray(given.read(region))


def test_what_is_made_place_by_place_needs_the_blocks_at_its_place_alone() -> None:
    whole = np.arange(40).reshape(10, 4)
    source = opened({"w": whole}, 64)["w"]
    assert source.npartitions > 2
    alike: dict[str, Any] = {"shape": whole.shape, "dtype": whole.dtype, "by_place": True}
    array = derive("double", doubled, {"given": source}, rows=source.chunks[0], **alike)
    assert [place for _, place in array.needs((1, 0))] == [(1, 0)]
    assert np.array_equal(values(array), 2 * whole)
    other = derive("double", doubled, {"given": source}, **alike)  # cut otherwise: of all
    assert len(list(other.needs((0, 0)))) == source.npartitions
    assert np.array_equal(values(other), 2 * whole)
