"""A fleet on a cluster that does what the test says: tasks begin, report and end when they are told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.jobs.fleet import Fleet
from pipeline.jobs.retry import Retry
from pipeline.jobs.runs import Run
from pipeline.jobs.units import Unit

WAIT_SECONDS = 60.0


def wait(until: Callable[[], object]) -> None:
    """Wait for something to happen."""
    end = time.monotonic() + WAIT_SECONDS
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def unit(name: str = "llama", **more: Any) -> Unit:
    """One of a model that is not there."""
    options = {"model_dir": f"/models/{name}", "output_dir": f"/ranks/{name}"}
    return Unit(name, (name,), f"/models/{name}", (f"/ranks/{name}",), options, **more)


class Future:
    """A task that does not end by itself."""

    status = "pending"

    def done(self) -> bool:
        return False


class Client:
    """What a fleet asks of a cluster. `status`: "closed" once its scheduler is lost."""

    status = "running"

    def __init__(self) -> None:
        self.hear: Callable[[tuple[float, Mapping[str, Any]]], None] = lambda _: None

    def subscribe_topic(self, _topic: str, hear: Callable[[tuple[float, Mapping[str, Any]]], None]) -> None:
        self.hear = hear

    def scheduler_info(self, **_: Any) -> dict[str, Any]:
        return {} if self.status == "closed" else {"workers": {"one": {"resources": {"MEMORY": 1e12, "GPU": 1.0}}}}

    def submit(self, *_: Any, **__: Any) -> Future:
        return Future()

    def cancel(self, _futures: list[Future]) -> None:
        assert self.status != "closed"


class Stage:
    """A fleet, and what its processes say."""

    def __init__(self, retry: Retry | None = None, **more: Any) -> None:
        self.client = Client()
        self.fleet = Fleet(self.client, retry or Retry(attempts=1), **more)

    def queue(self, *units: Unit, cause: str = "nightly") -> list[Run]:
        runs = self.fleet.add(units, cause)
        self.fleet.step()
        return runs

    def say(self, run: Run, event: str, **values: Any) -> None:
        self.client.hear((time.time(), {"run": run.number, "event": event, **values}))
        self.fleet.step()

    def start(self, run: Run, **more: Any) -> None:
        self.say(run, "began", pid=77, host="worker-1")
        self.say(run, "started", page="http://worker-1:8787/headrace", dashboard="", **more)

    def progress(self, run: Run, done: int, total: int = 1000, **more: Any) -> None:
        """`done` bytes, each written in one second."""
        stages = {"read": {"bytes": float(done), "seconds": 1.0}, "write": {"bytes": float(done), "seconds": 2.0}}
        rates = {"bytes_per_second": 10.0, "eta_seconds": (total - done) / 10, "bytes_written": done, "stages": stages}
        self.say(run, "progress", bytes=done, total_bytes=total, **{**rates, **more})

    def end(self, run: Run, code: int = 0, error: str = "", written: int = 1000, **more: Any) -> None:
        stages = {"read": {"bytes": float(written), "seconds": 2.0}, "write": {"bytes": float(written), "seconds": 4.0}}
        figures = {"seconds": 7.0, "bytes_written": written, "bytes_read": written, "peak_memory_bytes": 1 << 27, "stages": stages}
        self.say(run, "over", attempt=len(run.attempts) + 1, result={"code": code, "error": error, "tail": [], **figures, **more})
