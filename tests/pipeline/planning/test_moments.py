"""The course of a run in headrace.json: all bytes, in the order of time, in few points."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import headrace
from pipeline.planning.moments import POINTS, Moment, course
from tests.pipeline.watching.held import several_blocks


@pytest.mark.parametrize("count", [0, 1, 7, POINTS, 5_000])
def test_few_points_say_all(count: int) -> None:
    made = random.Random(count)
    moments = [Moment(1_000 + made.random() * 300, made.randrange(1 << 30), made.randrange(1 << 30)) for _ in range(count)]
    found = course(moments, 1_000, 5)
    assert len(found["seconds"]) == len(found["bytes"]) == len(found["memory_bytes"]) <= min(count, POINTS)
    assert found["seconds"] == sorted(found["seconds"])
    assert found["bytes"] == sorted(found["bytes"])
    assert max(found["bytes"], default=0) == sum(each.nbytes for each in moments)
    assert max(found["memory_bytes"], default=-1) == max((each.memory_bytes for each in moments), default=-1)
    assert max(found["seconds"], default=0) == pytest.approx(max((each.ended - 1_000 for each in moments), default=0), abs=1e-3)
    assert found["memory_limit_bytes"] == 5


def test_a_clock_that_is_behind_begins_at_the_start() -> None:
    assert course([Moment(9.0, 5, -1), Moment(11.0, 6, 7)], 10.0)["seconds"] == [0.0, 1.0]


@pytest.mark.parametrize("scheduler", ["local", "threads"])
@pytest.mark.parametrize("after", ["none", "read"])
def test_an_output_tells_of_its_run(tmp_path: Path, scheduler: str, after: str) -> None:
    source = several_blocks(tmp_path / "model")
    result = headrace.convert(
        model_dir=source, output_dir=tmp_path / "out", scheduler=scheduler, scratch_after=after, scratch=tmp_path / "scratch"
    )
    timings = json.loads((tmp_path / "out" / "headrace.json").read_text())["timings"]
    found = timings["course"]
    assert found["bytes"][-1] == result.bytes_written + result.scratch_bytes_written
    assert 0 < found["seconds"][0] <= found["seconds"][-1] <= timings["seconds"]
    assert all(0 < memory <= result.peak_memory_bytes for memory in found["memory_bytes"])
    assert found["memory_limit_bytes"] == headrace.plan(model_dir=source, output_dir=tmp_path / "next").budget.limit_bytes
