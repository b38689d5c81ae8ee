"""Ranges that are fetched ahead: the bytes themselves, each once, some under way, and nothing left behind."""

from __future__ import annotations

import itertools
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import convert, plan
from pipeline.tensor.placement import Region, ends, slices, whole
from stages.read import remote
from stages.read.read_ahead import AHEAD, ReadAhead
from stages.read.remote import RemoteTensor
from tests.support import checkpoints
from tests.support.range_server import range_server

DATA = np.random.default_rng(0).integers(0, 255, 10_000).astype(np.uint8).tobytes()


class Object:
    """Counts what is fetched of DATA; `broken` is the range's start that fails."""

    def __init__(self, broken: int = -1) -> None:
        self.broken, self.fetched = broken, list[tuple[int, int]]()

    def __call__(self, start: int, end: int) -> bytes:
        self.fetched.append((start, end))
        if start == self.broken:
            raise OSError(5, "broken")
        return DATA[start:end]


@given(st.integers(1, 3000), st.integers(1, len(DATA)))
def test_a_run_that_is_read_in_order_is_fetched_once(size: int, end: int) -> None:
    counted = Object()
    ahead = ReadAhead(counted, end)
    got = b"".join(ahead.read(start, min(start + size, end)) for start in range(0, end, size))
    assert got == DATA[:end]
    assert sorted(counted.fetched) == [(start, min(start + size, end)) for start in range(0, end, size)]


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 1000)), max_size=12))
def test_any_order_gives_the_same_bytes(ranges: list[tuple[int, int]]) -> None:
    ahead = ReadAhead(Object(), len(DATA))
    for start, size in ranges:
        assert ahead.read(start, start + size) == DATA[start : start + size]


def test_pieces_are_under_way_while_one_is_used_and_no_more_than_that() -> None:
    asked, let = list[int](), threading.Event()

    def fetch(start: int, end: int) -> bytes:
        asked.append(start)
        if start:
            let.wait(10)
        return DATA[start:end]

    ahead = ReadAhead(fetch, len(DATA))
    assert ahead.read(0, 100) == DATA[:100]  # while all others hang
    while len(asked) < 1 + AHEAD:
        threading.Event().wait(0.01)
    assert sorted(asked) == [0, *(100 * (n + 1) for n in range(AHEAD))]
    let.set()
    assert ahead.read(100, 200) == DATA[100:200]


def test_an_error_comes_out_where_its_piece_is_asked_for() -> None:
    ahead = ReadAhead(Object(broken=200), len(DATA))
    assert ahead.read(0, 100) + ahead.read(100, 200) == DATA[:200]
    with pytest.raises(OSError, match="broken"):
        ahead.read(200, 300)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_the_end_of_a_region_is_behind_its_last_element(shape: list[int], data: st.DataObject) -> None:
    bounds: list[tuple[int, int]] = []
    for length in shape:
        start = data.draw(st.integers(0, length - 1))
        bounds.append((start, data.draw(st.integers(start + 1, length))))
    region: Region = tuple(bounds)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    assert ends(tuple(shape), region)[1] == numbers[slices(region)].max() + 1


def test_a_block_reads_ahead_in_its_own_region_by_one_thread_and_travels_without(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.frombuffer(DATA[:8000], np.uint8).reshape(80, 100)
    counted = Object()
    monkeypatch.setattr(remote, "fetch_range", lambda _url, _name, start, end, _etag: counted(start, end))
    block = RemoteTensor("w", 0, values.shape, values.dtype, url="http://host").block(((10, 40), (0, 100)))
    for start in range(0, 30, 5):
        assert (block.read(((start, start + 5), (0, 100))) == values[10 + start : 15 + start]).all()
    assert sorted(counted.fetched) == [(start, start + 500) for start in range(1000, 4000, 500)]
    found: list[bool] = []
    again = pickle.loads(pickle.dumps(block))
    for each in (block, again):
        other = threading.Thread(target=lambda each=each: found.append(bool((each.read(whole((30, 100))) == values[10:40]).all())))
        other.start()
        other.join()
    assert found == [True, True]


def test_a_conversion_fetches_each_byte_once_and_its_plan_has_room_for_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = {**checkpoints.LLAMA, "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024}
    checkpoints.write(tmp_path / "served/m", config)
    with range_server(tmp_path / "served") as served:
        here = plan(model_dir=tmp_path / "served/m", output_dir=tmp_path / "out", memory_limit="200MiB")
        there = plan(model_dir=f"{served.url}/m", output_dir=tmp_path / "out", memory_limit="200MiB")
        assert there.budget.piece_bytes < here.budget.piece_bytes
        served.requests.clear()
        convert(model_dir=f"{served.url}/m", output_dir=tmp_path / "out", scheduler="threads", memory_limit="200MiB")
        ranges = sorted((first, last) for kind, name, first, last in served.requests if kind == "GET" and name.endswith("s"))
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))
        assert sum(last + 1 - first for first, last in ranges) == here.source.nbytes
