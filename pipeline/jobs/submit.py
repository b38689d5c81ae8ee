"""Units into a queue of the store; and planning them in a process of its own, for a daemon that is to stay small."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import BadInput, HeadraceError, Problem
from pipeline.jobs.conversion import command, environment
from pipeline.jobs.events import Hub, JobFinished
from pipeline.jobs.rows import ACTIVE, GOOD, Conversion, RunRow, Unit
from pipeline.jobs.store import Store

PLANNING_SECONDS = 600.0  # a checkpoint on a file system that does not answer


def submit(store: Store, hub: Hub, units: Sequence[Unit], queue: str, cause: str, repeat: bool = True) -> list[RunRow]:
    """Queue what is to be done; record what is refused or up to date as the run that it would have been. One row a unit.

    Without `repeat`, as for a trigger that finds the same every minute, what ended the same the last time is not recorded again.
    """
    result = []
    for unit in units:
        if not (unit.error or unit.up_to_date):
            result.append(store.enqueue(unit.conversion, queue, cause)[0])
            continue
        ended: Literal["refused", "up_to_date"] = "refused" if unit.error else "up_to_date"
        before = None if repeat else store.latest(unit.conversion)
        as_before = ACTIVE if unit.error else (*ACTIVE, *GOOD)
        if before and (before.state in as_before or (before.state, before.error) == (ended, unit.error)):
            result.append(before)
            continue
        code = 2 if unit.error else 0
        run, _ = store.enqueue(unit.conversion, queue, cause, ended, code, unit.error)
        result.append(run)
        heading = (run.queued, run.job, run.id, run.name)
        hub.publish(JobFinished(*heading, run.outputs, 0, ended, code, 0.0, 0, 0, 0, unit.error))
    return result


def plan_apart(request: Mapping[str, Any]) -> list[Unit]:
    """The units of a request, planned by another process, whose memory is then given back.

    `request`: `folder`, which relative paths are relative to; `names` of files, or a `matrix` and `where` it stands; `max_memory`.
    Raises BadInput as planning here would, and HeadraceError where the process fails otherwise.
    """
    started = subprocess.run(
        command("pipeline.jobs.submit"),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=PLANNING_SECONDS,
    )
    if started.returncode:
        raise HeadraceError(f"planning ended with exit code {started.returncode}: {started.stderr.strip()[-2000:]}")
    said = json.loads(started.stdout)
    if "problems" in said:
        raise BadInput([Problem(**problem) for problem in said["problems"]])
    return [_unit(each) for each in said["units"]]


def _unit(said: Mapping[str, Any]) -> Unit:
    lists = ("outputs", "resources", "scratch")
    values = {**said["conversion"], **{name: tuple(said["conversion"][name]) for name in lists}}
    conversion = Conversion(**{**values, "parts": tuple((name, count) for name, count in values["parts"])})
    parts = tuple(_unit(part) for part in said["parts"])
    return Unit(conversion, tuple(said["members"]), said["up_to_date"], said["error"], parts, said["shared"])


def main() -> None:
    """Plan the request on standard input."""
    from pipeline.jobs.requests import gather, of_matrix
    from pipeline.jobs.units import make_units

    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    try:
        if "matrix" in request:
            requests = of_matrix(request["matrix"], folder, request["where"])
        else:
            requests = list(gather(request["names"], folder).requests)
        said: dict[str, Any] = {"units": [asdict(unit) for unit in make_units(requests, request["max_memory"])]}
    except BadInput as error:
        said = {"problems": [asdict(problem) for problem in error.problems]}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
