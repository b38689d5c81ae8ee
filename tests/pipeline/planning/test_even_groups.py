"""Groups of a large model are small enough that workers who take them in turn end at nearly the same time."""

from __future__ import annotations

import heapq
from pathlib import Path

import pytest

from benchmarks.models import make
from benchmarks.scale import bytes_of
from pipeline import plan
from pipeline.planning.bind import bind


@pytest.mark.parametrize(
    ("shape", "workers"),
    [("70B", 8), *(pytest.param(shape, 32, marks=pytest.mark.nightly) for shape in ("70B", "405B"))],
)
def test_workers_that_take_groups_in_turn_end_together(tmp_path: Path, shape: str, workers: int) -> None:
    make(tmp_path / "model", shape, sparse=True)
    planned = plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=8)
    loads = [bytes_of(bind(planned, 0, index, (0,)).work) for index in range(planned.tasks)]
    busy_until = [0] * workers
    for each in loads:
        heapq.heappush(busy_until, heapq.heappop(busy_until) + each)
    assert sum(loads) / workers / max(busy_until) > 0.9
