"""What the Dask dashboard shows of a conversion: tasks by name, and the seconds and bytes of each stage inside them."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipeline import plan
from pipeline.run.cluster import in_process_cluster
from pipeline.run.execute import execute
from pipeline.run.schedulers import Session, run_distributed
from pipeline.watching.listener import Silent
from stages.write import Written
from tests.support import checkpoints, quantized_checkpoints
from tests.support.places import SMOLLM2 as MODEL


@pytest.mark.parametrize(
    ("kind", "after", "stages"),
    [
        ("dense", "none", {"read", "rename", "write"}),
        ("dense", "rename", {"read", "rename", "scratch", "write"}),
        ("gptq", "none", {"read", "rename", "unpack", "quantize", "write"}),
        ("gptq", "unpack", {"read", "rename", "unpack", "scratch", "quantize", "write"}),
    ],
)
def test_the_scheduler_sees_the_stages_the_edges_and_the_totals(
    kind: str, after: str, stages: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Dask's scheduler: a prefix for each stage that the groups pass, edges between them, as many tasks as the plan has."""
    source = tmp_path / "model"
    if kind == "dense":
        checkpoints.write(source, checkpoints.LLAMA)
    else:
        quantized_checkpoints.write(source, quantized_checkpoints.LLAMA, quantized_checkpoints.gptq())
    monkeypatch.setattr("pipeline.planning.make_plan.block_bytes", lambda _: 20_000)
    made = plan(model_dir=source, output_dir=tmp_path / "out", tp_size=2, scratch_after=after, workers=1)
    assert max(len(phase.groups) for phase in made.phases) > 3
    writes: list[str] = []
    with in_process_cluster(1) as client:
        scheduler = client.cluster.scheduler
        listener = Seen(scheduler)
        execute(made, listener, session=Session(lambda graph: run_distributed(client, graph), "", client))
        writes = listener.writes
        seen = listener.tasks
    assert {stage for stage, _ in seen} == {*stages, "finish"}
    groups = {len(phase.groups) for phase in made.phases}
    for stage in stages:
        assert sum(1 for each, _ in seen if each == stage) in {*groups, sum(groups)} or stage in ("unpack", "quantize")
    order = [
        stage
        for stage in ("read", "rename", "unpack", "scratch", "cast", "quantize", "write", "finish")
        if stage in {*stages, "finish"}
    ]
    for (stage, number), dependencies in seen.items():
        if stage not in ("read", "finish"):
            assert dependencies, (stage, number)
        assert all(order.index(each) < order.index(stage) or stage == "scratch" for each, _ in dependencies)
    if after != "none":
        readers = [key for key, dependencies in seen.items() if any(stage == "scratch" for stage, _ in dependencies)]
        assert readers
    # Groups are written in the order of the source; those of fewer stages may be ready a little sooner.
    numbers = [int(number) for number in writes]
    turned = sum(b < a for n, a in enumerate(numbers) for b in numbers[n + 1 :])
    assert turned <= len(numbers) * (len(numbers) - 1) / 2 * 0.2
    assert len([key for key in seen if key[0] == "write"]) == len(made.phases[-1].groups)


class Seen(Silent):
    """Notes what the scheduler holds at the start and the order in which groups are written."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.tasks: dict[Any, list[Any]] = {}
        self.writes: list[str] = []

    def advanced(self, written: Written) -> None:
        for key, state in self.scheduler.tasks.items():
            self.tasks[key] = [each.key for each in state.dependencies]
        if not any(part.chunk for part in written.checksums):
            self.writes.append(str(written.number))


def test_stages_are_metered_on_the_scheduler(tmp_path: Path) -> None:
    made = plan(model_dir=MODEL, output_dir=tmp_path / "out", tp_size=3)
    with in_process_cluster(2) as client:
        result = execute(made, session=Session(lambda graph: run_distributed(client, graph), "", client))
        scheduler = client.cluster.scheduler
        # Workers send their metrics with their heartbeats.
        written = sum(phase.written_bytes((0,)) for phase in made.phases)
        for _ in range(100):
            metrics = {
                key[2:]: value for key, value in scheduler.cumulative_worker_metrics.items() if key[:2] == ("execute", "write")
            }
            if metrics.get(("write", "bytes")) == written:
                break
            time.sleep(0.1)
        assert metrics["write", "bytes"] == written
        assert metrics["read", "bytes"] == made.bytes_read == result.bytes_read
        for stage in ("read", "rename", "unpack", "cast", "shard", "checksum", "write"):
            assert metrics[stage, "seconds"] > 0, stage


def test_the_dashboard_answers(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    with in_process_cluster(1) as client:
        port = client.scheduler_info()["services"]["dashboard"]
        status, text = fetch(f"http://127.0.0.1:{port}/status")
        assert status == 200
        assert b"Dask" in text


def fetch(address: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(address, timeout=30) as page:
            return page.status, page.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
