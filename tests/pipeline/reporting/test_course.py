"""The report's charts of the run over time: drawn of headrace.json, and left out where that says what no run has."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.reporting.html import render_report
from pipeline.reporting.html.course import course_charts, throughput
from pipeline.reporting.html.flow import steps
from pipeline.reporting.html.provenance import Course, read_provenance
from pipeline.tensor.checkpoint import Checkpoint
from tests.support import report_pages

TOLD = {
    "seconds": (1.0, 2.0, 4.0),
    "bytes": (100e6, 200e6, 600e6),
    "memory_bytes": (50 << 20, 80 << 20, 60 << 20),
    "memory_limit_bytes": 1 << 30,
}


def told(**changed: Any) -> Course:
    return Course(**{**TOLD, **changed})


def of_a_run(timings: dict[str, Any]) -> Checkpoint:
    checkpoint = report_pages.checkpoint(2)
    recorded = {**checkpoint.provenance, "timings": {**checkpoint.provenance["timings"], **timings}}
    return Checkpoint(checkpoint.directory, checkpoint.config, checkpoint.ranks, recorded)


def test_both_lines_are_drawn_with_the_limit() -> None:
    text = course_charts(told())
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Throughput", "Memory of a process, and its limit"]
    assert text.count('class="line ') == 2
    assert text.count('class="limit"') == 1
    assert "MB/s" in text
    assert 'class="limit"' not in course_charts(told(memory_limit_bytes=0))
    assert course_charts(told(memory_bytes=(-1, -1, -1))).count("<section>") == 1


def test_bytes_between_two_ends_are_spread_evenly() -> None:
    line = throughput(list(zip(TOLD["seconds"], TOLD["bytes"], TOLD["memory_bytes"], strict=True)))  # type: ignore[call-overload]
    assert [seconds for seconds, _ in line] == pytest.approx([0, 4 / 3, 8 / 3, 4])
    assert [rate for _, rate in line] == pytest.approx([100e6, 100e6, 150e6, 200e6])
    assert sum(rate * 4 / 3 for _, rate in line[1:]) == pytest.approx(600e6)


@pytest.mark.parametrize(
    "changed",
    [
        {"seconds": ()},
        {"seconds": (1.0,)},
        {"seconds": (3.0, 2.0, 4.0)},
        {"bytes": (3e6, 2e6, 9e6)},
        {"seconds": (0.0, 0.0, 0.0)},
        {"seconds": (-1.0, 2.0, 4.0)},
        {"seconds": (1.0, 2.0, float("inf"))},
        {"bytes": (1.0, 2.0, float("nan"))},
        {"memory_bytes": (1e300, 1.0, 1.0)},
        {"memory_limit_bytes": float("inf")},
    ],
    ids=str,
)
def test_what_no_run_has_is_not_drawn(changed: dict[str, Any]) -> None:
    assert course_charts(told(**changed)) == ""


def test_the_report_has_them() -> None:
    text = render_report(of_a_run({"course": TOLD}))
    assert text.index('id="plan"') < text.index('id="course"') < text.index('id="ranks"')
    assert 'id="course"' not in render_report(of_a_run({}))
    assert "Not shown, as they are not what headrace writes: timings" in render_report(of_a_run({"course": {"seconds": ["x"]}}))


@pytest.mark.parametrize("after", ["read", "unpack"])
def test_scratch_stands_where_it_was(after: str) -> None:
    stages = {stage: {"seconds": 1.0, "bytes": 5} for stage in ("read", "unpack", "read_scratch", "write_scratch", "write")}
    checkpoint = of_a_run({"stages": stages, "scratch_after": [after], "phases": {}})
    provenance, _ = read_provenance(checkpoint)
    assert provenance
    names = [step.name for step in steps(checkpoint, provenance)]
    place = names.index(after)
    assert names[place : place + 3] == [after, "write_scratch", "read_scratch"]
    assert sorted(names) == sorted(set(names))
