"""A conversion that does what the test says, in the place of a process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.jobs.events import Event, Hub
from pipeline.jobs.limits import Limits
from pipeline.jobs.retry import Retry
from pipeline.jobs.runner import Runner
from pipeline.jobs.store import SERVE, JobStore

GIB = 1 << 30


@dataclass
class Fake:
    """What Runner knows of a Process. It runs until `code` is set."""

    text: str
    heard: Callable[[Mapping[str, Any]], None]
    pid: int = 1
    code: int | None = None
    error: str = ""
    passing: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    finished: Mapping[str, Any] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)
    seconds: float = 1.0
    told: list[str] = field(default_factory=list)
    on_stop: int | None = 3

    def go(self) -> None:
        self.told.append("go")

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.told.append("stop")
        self.code = self.on_stop if self.code is None else self.code

    def kill(self) -> int:
        self.told.append("kill")
        self.code = -9
        return self.code

    def report(self) -> str:
        return self.error


class Stage:
    """A runner on a store, with fakes for processes, by the names of the directories that they write."""

    def __init__(self, store: JobStore, limits: Limits | None = None, retry: Retry | None = None, queue: str = SERVE) -> None:
        self.store, self.hub, self.events, self.made = store, Hub(), list[Event](), list[Fake]()
        self.hub.subscribe(self.events.append)
        self.worker = store.register("serve").id
        bounds = limits or Limits(100, 100 * GIB)
        self.runner = Runner(
            store, self.hub, self.worker, queue, bounds, retry, stall_seconds=50, stop_seconds=0.1, start=self._start
        )

    def _start(self, file: Path, heard: Callable[[Mapping[str, Any]], None]) -> Any:
        self.made.append(Fake(file.read_text(), heard))
        return self.made[-1]

    def heard(self, kind: type[Event]) -> list[Any]:
        """The events of a kind."""
        return [event for event in self.events if type(event) is kind]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.runner.step()
