"""Stores for tests: a clock that is told the time, and conversions without a model."""

from __future__ import annotations

from pathlib import Path

from pipeline.jobs.rows import Conversion
from pipeline.jobs.store import JobStore, open_store


class Clock:
    """Seconds since 1970, as the test says."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def fresh(directory: Path, clock: Clock | None = None) -> JobStore:
    return open_store(directory / "jobs.db", clock or Clock())


def conversion(name: str = "a", *resources: str, **more: object) -> Conversion:
    """A conversion to the directory of its name, or to several."""
    outputs = resources or (f"/ranks/{name}",)
    options = {"model_dir": "/models/m", "target": [{"output_dir": output} for output in outputs], **more}
    return Conversion(name, "/models/m", outputs, options, outputs, dict.fromkeys(outputs, 10), 100)
