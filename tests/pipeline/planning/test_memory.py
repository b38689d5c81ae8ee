"""The memory budget: what it projects covers every tensor and stays under the limit; what it refuses, it says how to mend."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.errors import BadInput
from pipeline.planning import memory
from pipeline.planning.memory import BASE_BYTES, DENSE_COPIES, MAX_BLOCK_BYTES, MIB, Budget, Need, block_bytes, budget
from pipeline.tensor.placement import pieces, size, whole
from tests.support import checkpoints

rows = st.integers(1, MIB) | st.integers(1, 64 * MIB)
needs = st.lists(st.builds(Need, st.sampled_from(["a", "b", "c"]), rows, st.integers(1, 8)), min_size=1, max_size=5)
# Often tight: above what a process takes anyway, below what would let every piece be as large as it may.
limits = st.integers(BASE_BYTES, BASE_BYTES + 256 * MIB) | st.integers(1, 8 << 30)
workers, tasks = st.integers(1, 16), st.integers(1, 200)


def attempt(limit: int, threads: int, wanted: list[Need], count: int) -> Budget | BadInput:
    try:
        return budget(limit, threads, wanted, count)
    except BadInput as error:
        return error


@given(limits, workers, needs, tasks)
def test_the_projected_peak_is_under_the_limit(limit: int, threads: int, wanted: list[Need], count: int) -> None:
    found = attempt(limit, threads, wanted, count)
    if isinstance(found, Budget):
        assert found.peak_bytes <= limit
        assert (found.workers, found.limit_bytes) == (threads, limit)


@given(limits, workers, needs, tasks)
def test_the_projected_peak_covers_every_tensor(limit: int, threads: int, wanted: list[Need], count: int) -> None:
    found = attempt(limit, threads, wanted, count)
    if isinstance(found, Budget):
        for need in wanted:
            piece = max(found.piece_bytes, need.least_piece_bytes)
            assert found.peak_bytes >= BASE_BYTES + threads * need.copies * piece, need


def test_a_packed_tensor_beside_a_wider_dense_one_is_covered() -> None:
    # The dense one needs most at its smallest piece, the packed one at the piece size that is then chosen.
    dense, packed = Need("dense", 4 * MIB, 3), Need("packed", MIB, 8)
    found = budget(BASE_BYTES + 50 * MIB, 1, [dense, packed], 0)
    assert BASE_BYTES + 8 * found.piece_bytes <= found.limit_bytes


@given(limits, workers, needs, tasks)
def test_a_refusal_names_the_tensor_and_remedies_that_work(limit: int, threads: int, wanted: list[Need], count: int) -> None:
    refused = attempt(limit, threads, wanted, count)
    if isinstance(refused, Budget):
        return
    (problem,) = refused.problems
    worst = max(need.least_piece_bytes * need.copies for need in wanted)
    assert any(problem.found.endswith(need.name) and need.least_piece_bytes * need.copies == worst for need in wanted)
    more = re.search(r"--memory_limit (\d+)MiB", problem.remedy)
    assert more
    assert isinstance(attempt(int(more[1]) * MIB, threads, wanted, count), Budget)
    # Less would not do: the remedy is not a guess.
    assert isinstance(attempt((int(more[1]) - 1) * MIB, threads, wanted, count), BadInput)
    fewer = re.search(r"--workers (\d+)", problem.remedy)
    if fewer:
        assert 0 < int(fewer[1]) < threads
        assert isinstance(attempt(limit, int(fewer[1]), wanted, count), Budget)


@given(st.integers(0, 1 << 44))
def test_blocks_grow_with_the_model_and_have_a_ceiling(total: int) -> None:
    size_bytes = block_bytes(total)
    assert 0 < size_bytes <= MAX_BLOCK_BYTES
    assert block_bytes(total + (1 << 40)) >= size_bytes


def test_a_plan_says_what_would_do_and_that_does(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    job = {"model_dir": tmp_path / "model", "output_dir": tmp_path / "out", "workers": 2}
    with pytest.raises(BadInput) as caught:
        pipeline.plan(**job, memory_limit=BASE_BYTES)
    more = re.search(r"--memory_limit (\w+)", caught.value.problems[0].remedy)
    assert more
    found = pipeline.plan(**job, memory_limit=more[1])
    assert found.budget.peak_bytes <= found.budget.limit_bytes == found.job.memory_limit


@pytest.mark.parametrize("config", [checkpoints.LLAMA, checkpoints.MIXTRAL], ids=["llama", "mixtral"])
def test_a_plan_projects_its_largest_piece(config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The least that each tensor can be cut to, and no more room for the plan itself than the pieces are.
    for name in ("MAX_PIECE_BYTES", "TASK_BYTES"):
        monkeypatch.setattr(memory, name, 1)
    checkpoints.write(tmp_path / "model", config)
    found = pipeline.plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2)
    largest = 0
    for store in found.phases[0].stores:
        shape = store.arrays[0].shape
        cut = [size(piece) for piece in pieces(whole(shape), store.itemsize, found.budget.piece_bytes, store.row_multiple)]
        assert len(cut) > 1 or math.prod(shape) * store.itemsize <= found.budget.piece_bytes, store.name
        largest = max(largest, *(elements * store.itemsize for elements in cut))
    assert 0 < largest * DENSE_COPIES * found.budget.workers <= found.budget.peak_bytes - BASE_BYTES
