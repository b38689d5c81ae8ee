"""Plans batch files as `headrace batch --dry_run` does, in a process whose memory is given back, and says how that has failed."""

from __future__ import annotations

import json
import subprocess
import threading
import traceback
from collections.abc import Mapping
from signal import SIGTERM
from typing import Any

from pipeline.errors import BadInput, HeadraceError, Interrupted, Problem, WriteFailed
from pipeline.jobs.child import Child
from pipeline.jobs.files import printable
from pipeline.jobs.units import Planned, Unit

_STATES: Mapping[int, Planned] = {2: "refused", 3: "failed"}


class Planner:
    """Plans, from any thread, until `stop` is set and `end` is called."""

    def __init__(self, max_memory: int | None, stop: threading.Event) -> None:
        """`max_memory`: what one conversion may use at most, in bytes."""
        self._limit = [] if max_memory is None else ["--max_memory", str(int(max_memory))]
        self._stop = stop
        self._children: list[Child] = []

    def units(self, names: list[str]) -> list[Unit]:
        """The units of batch files.

        Raises BadInput where these are wrong, OSError and WriteFailed for what may pass (no room for one more process, a signal
        from somewhere), Interrupted where it was stopped, HeadraceError for a bug.
        """
        child = Child(["batch", *names, "--dry_run", "--json", "--log_format", "json", *self._limit], stdout=subprocess.PIPE)
        self._children.append(child)
        if self._stop.is_set():
            child.signal(SIGTERM)
        assert child.process.stdout
        with child.process.stdout as stream:
            said = stream.read()
        code = child.process.wait()
        child.poll()
        self._children.remove(child)
        if self._stop.is_set():
            raise Interrupted("stopped")
        if code < 0 or code == 3:
            raise WriteFailed(f"planning: {child.report(code)}")
        if code == 2 and "error" in child.events:
            raise BadInput([_problem(each) for each in child.events["error"].get("problems", ())] or [_said(child.report(code))])
        if code not in (0, 2) or not said:
            raise HeadraceError(f"planning ended with exit code {code}: {child.report(code)}")
        return [
            Unit.of({key: value for key, value in each.items() if key not in ("bytes", "file")})
            for each in json.loads(said)["units"]
        ]

    def end(self) -> None:
        """Have what is being planned end."""
        for child in [*self._children]:
            child.signal(SIGTERM)


def not_planned(trigger: str, source: str, error: Exception) -> Unit:
    """The unit that stands for a request of which planning made none, by what that ended with."""
    if isinstance(error, HeadraceError):
        state, text = _STATES.get(error.exit_code, "crashed"), str(error)
    elif isinstance(error, OSError):
        state, text = "failed", str(error)
    else:
        state, text = "crashed", "".join(traceback.format_exception(error))
    return Unit(trigger, (trigger,), printable(source), (), {}, state, printable(text))


def _problem(said: Mapping[str, Any]) -> Problem:
    return Problem(**{name: said[name] for name in ("subject", "found", "expected", "remedy", "passing") if name in said})


def _said(text: str) -> Problem:
    return Problem("planning", text, "units")
