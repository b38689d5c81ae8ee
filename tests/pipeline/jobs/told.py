"""A store with jobs, and events as a runner publishes them, without any conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.jobs.events import Hub, JobFinished, JobStarted, Progress
from pipeline.jobs.rows import AttemptRow, Conversion, RunRow
from pipeline.jobs.store import SERVE, JobStore, open_store


class Told:
    """One worker's store and hub."""

    def __init__(self, directory: Path) -> None:
        self.store: JobStore = open_store(directory / "jobs.db")
        self.hub = Hub()
        self.worker = self.store.register("serve").id

    def queue(self, name: str) -> RunRow:
        output = f"/ranks/{name}"
        wanted = Conversion(name, f"/models/{name}", (output,), {"output_dir": output}, (output,), {output: 100}, 1 << 28)
        return self.store.enqueue(wanted, SERVE, "nightly")[0]

    def start(self, run: RunRow) -> AttemptRow:
        attempt = self.store.claim(run.id, self.worker)
        assert isinstance(attempt, AttemptRow)
        self.hub.publish(JobStarted(*self.of(run), run.outputs, attempt.number, 1))
        return attempt

    def progress(self, run: RunRow, done: int, total: int = 1000, **more: Any) -> None:
        stages = {"read": {"bytes": float(done), "seconds": 1.0}, "write": {"bytes": float(done), "seconds": 2.0}}
        figures = {"bytes_per_second": 10.0, "eta_seconds": (total - done) / 10, "layer": "layers.1", "by_stage": stages, **more}
        self.hub.publish(Progress(*self.of(run), attempt=1, bytes=done, total_bytes=total, **figures))

    def finish(self, run: RunRow, attempt: AttemptRow, outcome: Any = "done", error: str = "", written: int = 1000) -> None:
        code = {"done": 0, "refused": 2}.get(outcome, 3)
        stages = {"read": {"bytes": float(written), "seconds": 2.0}, "write": {"bytes": float(written), "seconds": 4.0}}
        self.store.finish(attempt.id, outcome, (written, 1000), outcome=outcome, exit_code=code, error=error, by_stage=stages)
        figures = {"seconds": 7.0, "bytes": written, "bytes_read": written, "peak_memory_bytes": 1 << 27, "by_stage": stages}
        event = JobFinished(
            *self.of(run), run.outputs, attempt=attempt.number, outcome=outcome, exit_code=code, error=error, **figures
        )
        self.hub.publish(event)

    def of(self, run: RunRow) -> tuple[float, int, int, str]:
        return 1.0, run.job, run.id, run.name
