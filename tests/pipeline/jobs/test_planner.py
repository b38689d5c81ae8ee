"""Planning for the daemon: how it fails is recorded and told, and keeps nothing else from being converted."""

from __future__ import annotations

import io
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import BadInput, HeadraceError, Problem, WriteFailed
from pipeline.jobs import planner
from pipeline.jobs.history import History
from pipeline.jobs.log import Log
from pipeline.jobs.schedule import read_schedule
from pipeline.jobs.serve import Daemon
from pipeline.jobs.watch import Arrival
from tests.pipeline.jobs.daemon import Place
from tests.pipeline.jobs.stand_in import Stage, unit, wait


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Watching:
    """A daemon that watches, not started: `found` is what has arrived, `plan` what planning its file returns or raises."""

    def __init__(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.write("schedule.toml", '[[watch]]\nname = "w"\npath = "in"\n[watch.job]\noutput_dir = "out/{model}"\n')
        self.history = History(place.path, write=True)
        self.daemon = Daemon(read_schedule(place.schedule), self.history, Log(io.StringIO(), "text"))
        self.stage = Stage()
        self.daemon.fleet = self.stage.fleet
        self.stage.fleet.listeners.append(self.daemon._record)
        ((self.watch, self.watcher),) = self.daemon._watchers
        self.found: list[Arrival] = []
        self.plan: dict[str, Any] = {}
        monkeypatch.setattr(self.watcher, "look", lambda: [each for each in self.found if not self.known(each)])
        monkeypatch.setattr(self.daemon._planner, "units", self._units)

    def arrive(self, name: str, plan: Any = None, fingerprint: str = "1") -> None:
        self.found.append(Arrival(f"/in/{name}", name, fingerprint))
        self.plan[name] = [unit(name)] if plan is None else plan

    def known(self, arrival: Arrival) -> bool:
        return self.daemon._known(self.watch, arrival.place) == arrival.fingerprint

    def look(self) -> list[tuple[str, str, int | None]]:
        """Look, and say what is recorded: sources, states and exit codes."""
        self.daemon._look(self.watch, self.watcher)
        return [(run["source"], run["state"], run["exit_code"]) for run in self.history.runs()[::-1]]

    def _units(self, names: list[str]) -> Any:
        (table,) = tomllib.loads(Path(names[0]).read_text())["matrix"]
        said = self.plan[Path(table["model_dir"]).name]
        if isinstance(said, Exception):
            raise said
        return said


@pytest.fixture
def watching(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watching]:
    made = Watching(place, monkeypatch)
    yield made
    made.history.close()


@pytest.mark.parametrize(
    ("error", "state", "code", "again"),
    [
        (BadInput([Problem("x", "y", "z")]), "refused", 2, False),
        (WriteFailed("planning: ended by SIGKILL"), "failed", 3, True),
        (OSError(12, "Cannot allocate memory"), "failed", 3, True),
        (HeadraceError("planning ended with exit code 1: Traceback"), "crashed", 1, False),
        (ZeroDivisionError("division by zero"), "crashed", 1, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_arrival_that_cannot_be_planned_is_recorded_once_and_keeps_none_behind_it(
    watching: Watching, error: Exception, state: str, code: int, again: bool
) -> None:
    watching.arrive("a", error)
    watching.arrive("b", error)
    watching.arrive("sound")
    recorded = [("/in/a", state, code), ("/in/b", state, code), ("/models/sound", "queued", None)]
    assert watching.look() == recorded
    assert all(str(error) in run["error"] for run in watching.history.runs() if run["state"] == state)
    assert watching.look() == recorded, "not every minute anew"
    assert [each.name for each in watching.found if not watching.known(each)] == (["a", "b"] if again else [])
    watching.plan |= {"a": [unit("a")]}
    assert (("/models/a", "queued", None) in watching.look()) == again
    assert list(watching.history.asked.iterdir()) == []


def test_an_arrival_whose_name_is_not_utf_8_is_refused_and_keeps_none_behind_it(watching: Watching) -> None:
    watching.arrive("a\udcff")
    watching.arrive("sound")
    assert watching.look() == [("/in/a\\udcff", "refused", 2), ("/models/sound", "queued", None)]
    assert "a name in UTF-8" in watching.history.run(1)["error"]
    assert len(watching.look()) == 2


def test_what_arrives_while_its_outputs_are_written_is_asked_for_when_they_are_done(watching: Watching) -> None:
    watching.arrive("model", fingerprint="1")
    watching.look()
    (run,) = watching.stage.fleet.active()
    watching.stage.fleet.step()
    watching.found.clear()
    watching.arrive("model", [unit("model", state="refused", error="taken")], fingerprint="2")
    assert watching.look() == [("/models/model", "queued", None)]
    watching.stage.start(run)
    watching.stage.end(run)
    watching.plan["model"] = [unit("model")]
    assert [state for _, state, _ in watching.look()] == ["done", "queued"]
    assert watching.known(watching.found[0])


def test_planning_that_a_signal_ends_is_tried_again_and_then_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by a bug, too, with processes that end so."""
    place.often(more="attempts = 2\n")
    begun: list[list[str]] = []

    class Ended(planner.Child):
        def __init__(self, words: list[str], **more: Any) -> None:
            begun.append(words)
            super().__init__(words, **more)
            self.process.kill()

    monkeypatch.setattr(planner, "Child", Ended)
    with place.serving() as said:
        wait(lambda: place.states() == ["failed"])
    (run,) = place.runs()
    assert (run["cause"], run["exit_code"], "SIGKILL" in run["error"]) == ("often", 3, True)
    assert len(begun) == 2
    assert [event["outcome"] for event in said if event["event"] == "ended"] == ["failed"]


def test_planning_that_a_bug_ends_is_told_with_its_traceback(place: Place, tmp_path: Path) -> None:
    place.often()
    (tmp_path / "site").mkdir()
    place.write(
        "site/sitecustomize.py", "import sys\nif '--dry_run' in sys.orig_argv:\n    sys.stderr.write('boom\\n'); sys.exit(1)\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH", ""))))
    with place.process(PYTHONPATH=path):
        wait(lambda: place.states() == ["crashed"])
    assert "boom" in place.jobs("logs", 1).out
