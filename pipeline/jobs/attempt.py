"""One attempt at a step of a unit, where a worker of the batch's cluster is: `headrace convert` as a process of its own."""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.jobs.child import Child, Heard
from pipeline.jobs.files import write_job

LOOK_SECONDS = 0.2  # between two looks whether it is still wanted
_FIGURES = ("bytes_read", "bytes_written", "peak_memory_bytes")


def on_worker(run: int, number: int, options: Mapping[str, Any], topic: str, stop_seconds: float) -> dict[str, Any]:
    """Do it as a task of Dask's; what the child says is published under `topic`, with the numbers of its run and attempt.

    It ends within `stop_seconds` once its task is cancelled, or the client, the scheduler or this worker is gone.
    """
    from distributed import get_worker
    from distributed.core import Status

    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state == "executing" and worker.status in (Status.running, Status.paused)

    def heard(event: Mapping[str, Any]) -> None:
        worker.log_event(topic, {**event, "run": run, "attempt": number})

    result = attempt(options, wanted, heard, stop_seconds)
    heard({"event": "over", "result": result})  # of a task that was cancelled nobody gets the result
    return result


def attempt(options: Mapping[str, Any], wanted: Callable[[], bool], heard: Heard, stop_seconds: float) -> dict[str, Any]:
    """Convert with these options of a job, until that is done or not `wanted` any more.

    Returns the exit code, the error, whether it may pass, figures in bytes and seconds, and the last lines that it said.
    """

    def told(event: Mapping[str, Any]) -> None:
        if event["event"] in ("started", "progress"):  # other libraries' words may be objects, too
            heard(event)

    try:
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            file = Path(folder) / "job.toml"
            write_job(file, options)
            child = Child(["convert", str(file), "--log_format", "json"], told)
            heard({"event": "began", "pid": child.process.pid, "host": socket.gethostname()})
            code = _followed(child, wanted, stop_seconds)
    except OSError as error:  # a full disk here, or no room for one more process
        return {"code": 3, "error": str(error), "passing": True, "seconds": 0.0, "tail": []}
    finished, failed = child.events.get("finished", {}), child.events.get("error", {})
    problems = failed.get("problems")
    return {
        "code": code,
        "error": child.report(code) if code else "",
        "passing": isinstance(problems, list) and bool(problems) and all(map(_passing, problems)),
        "seconds": time.monotonic() - child.begun,
        "up_to_date": bool(finished.get("up_to_date")),
        "stages": finished.get("stages") or child.events.get("progress", {}).get("stages") or {},
        "tail": list(child.tail),
        **{name: finished.get(name, 0) for name in _FIGURES},
    }


def _passing(problem: Any) -> bool:
    return isinstance(problem, dict) and bool(problem.get("passing"))


def _followed(child: Child, wanted: Callable[[], bool], stop_seconds: float) -> int:
    """The exit code of a child, which is asked to end, and then killed, when it is not wanted any more."""
    stopped = 0.0
    while (code := child.poll()) is None:
        if not stopped and not wanted():
            child.signal(signal.SIGTERM)
            stopped = time.monotonic()
        elif stopped and time.monotonic() - stopped > stop_seconds:
            child.signal(signal.SIGKILL)
        time.sleep(LOOK_SECONDS)
    return code
