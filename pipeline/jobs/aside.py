"""Runs work beside the daemon in processes of its own, whose memory is given back: planning a batch, fetching a checkpoint.

A module that is run like this reads its request, one JSON object, from standard input and prints its answer, another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pipeline.errors import BadInput, HeadraceError, Interrupted, Problem
from pipeline.jobs.conversion import command, environment
from pipeline.jobs.parent import end_with_parent
from pipeline.jobs.rows import Conversion, Unit


class Aside:
    """Runs such modules, from any thread, until it is closed."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, module: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run a module on a request and return its answer.

        Raises BadInput with the problems that it reports, Interrupted where `close` ended it, HeadraceError for any other failure.
        """
        with self._lock:
            if self._closed:
                raise Interrupted(f"{module}: interrupted")
            pipe = subprocess.PIPE
            started = subprocess.Popen(
                command(module), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(), start_new_session=True
            )
            self._running.add(started)
        try:
            out, errors = started.communicate(json.dumps(request))
        finally:
            with self._lock:
                self._running.discard(started)
        if self._closed:
            raise Interrupted(f"{module}: interrupted")
        if started.returncode:
            raise HeadraceError(f"{module} ended with exit code {started.returncode}: {errors.strip()[-2000:]}")
        said: dict[str, Any] = json.loads(out)
        if "problems" in said:
            raise BadInput([Problem(**problem) for problem in said["problems"]])
        return said

    def units(self, request: Mapping[str, Any]) -> list[Unit]:
        """The units of a request, as pipeline.jobs.planner plans them."""
        return [_unit(each) for each in self.run("pipeline.jobs.planner", request)["units"]]

    def close(self) -> None:
        """End what runs, and let nothing begin any more."""
        with self._lock:
            self._closed = True
            for each in self._running:
                each.kill()


def answer(work: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Do the work for the request on standard input and print its answer: the main program of such a module."""
    end_with_parent()
    try:
        said = work(json.load(sys.stdin))
    except BadInput as error:
        said = {"problems": [asdict(problem) for problem in error.problems]}
    json.dump(said, sys.stdout)


def _unit(said: Mapping[str, Any]) -> Unit:
    """A unit from its values in JSON, where tuples are lists."""
    values = dict(said["conversion"])
    values |= {name: tuple(values[name]) for name in ("outputs", "resources", "scratch")}
    values["parts"] = tuple((name, count) for name, count in values["parts"])
    parts = tuple(_unit(part) for part in said["parts"])
    return Unit(Conversion(**values), tuple(said["members"]), said["up_to_date"], said["error"], parts, said["shared"])
