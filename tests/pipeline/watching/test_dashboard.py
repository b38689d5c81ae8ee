"""What the Dask dashboard shows of a conversion: tasks by name, and the seconds and bytes of each stage inside them."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.run.lower import lower

from pipeline import plan
from pipeline.run.schedulers import _local_cluster, run_distributed
from tests.support import checkpoints
from tests.support.places import SMOLLM2 as MODEL


def test_stages_are_metered_on_the_scheduler(tmp_path: Path) -> None:
    made = plan(model_dir=MODEL, output_dir=tmp_path / "out", tp_size=3)
    (target,) = made.targets
    phase = made.phases[-1]
    journal = target.output.begin(len(phase.groups), fresh=True)
    with _local_cluster(2) as client:
        graph = lower(phase, made.budget.piece_bytes, [0])
        written = sum(result.bytes_written for result in run_distributed(client, graph))
        scheduler = client.cluster.scheduler
        assert set(scheduler.task_prefixes) == {"write"}
        # Workers send their metrics with their heartbeats.
        for _ in range(100):
            metrics = {
                key[2:]: value for key, value in scheduler.cumulative_worker_metrics.items() if key[:2] == ("execute", "write")
            }
            if metrics.get(("write", "bytes")) == written:
                break
            time.sleep(0.1)
        assert metrics["write", "bytes"] == written
        assert metrics["read", "bytes"] == made.bytes_read
        for stage in ("read", "rename", "unpack", "cast", "shard", "checksum", "write"):
            assert metrics[stage, "seconds"] > 0, stage
    journal.remove()


def test_the_dashboard_answers(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    with _local_cluster(1) as client:
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
