"""A phase's tasks have a name in journals: one that is cut elsewhere is another, and what it has done counts for nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import plan
from pipeline.planning.plans import Plan
from pipeline.sinks.output import Output
from tests.support import checkpoints


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    checkpoints.save_wide_layer(tmp_path / "model")
    return plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, scheduler="threads")


def test_tasks_that_are_cut_elsewhere_have_another_name(planned: Plan) -> None:
    (phase,) = planned.phases
    blocks = [block for group in phase.groups for block in group]
    names = set()
    for cut in range(1, len(blocks)):
        names.add(replace(phase, groups=(tuple(blocks[:cut]), tuple(blocks[cut:]))).tasks)
    assert len(names) == len(blocks) - 1 > 1, "as many tasks, of other blocks each"
    assert {name.partition(" ")[0] for name in names} == {"2"}
    assert replace(phase).tasks == phase.tasks


def test_what_other_tasks_have_written_is_not_taken_up(planned: Plan) -> None:
    (phase,) = planned.phases
    (output,) = phase.sinks
    assert isinstance(output, Output)
    journal = output.begin(phase.tasks, fresh=False)
    journal.append({"done": [0], "sums": []})
    journal.close()
    assert [each["done"] for each in output.begun(phase.tasks)] == [[0]]
    assert output.begun("1 of others") == []
    other = output.begin("1 of others", fresh=False)
    assert list(other.entries) == []
    other.close()
