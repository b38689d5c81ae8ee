"""The history of a daemon: what it records, what the next one takes up, requests beside it, and one daemon alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.errors import BadInput
from pipeline.jobs.history import DAY, History, default_path
from pipeline.jobs.units import Unit
from pipeline.sinks.hold import Holder, birth, holder
from tests.pipeline.jobs.stand_in import Stage, unit

NOTE = "history.db.serve.lock"


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    opened = History(tmp_path / "history.db", write=True)
    yield opened
    opened.close()


@pytest.fixture
def stage(history: History) -> Stage:
    """A fleet whose runs are recorded."""
    made = Stage(first=history.next())
    made.fleet.listeners.append(lambda _event, run, _said: history.save(run))
    return made


def test_a_run_from_the_queue_to_its_end(history: History, stage: Stage) -> None:
    (run,) = stage.queue(unit("llama"))
    (row,) = history.runs()
    assert (row["number"], row["name"], row["state"], row["cause"]) == (1, "llama", "queued", "nightly")
    assert Unit.of(row["unit"]) == run.unit
    stage.start(run)
    stage.progress(run, 400)
    row = history.run(1)
    assert (row["state"], row["bytes_done"], row["bytes_total"], row["host"]) == ("running", 400, 1000, "worker-1")
    assert row["page"] == "http://worker-1:8787/headrace"
    stage.end(run, 3, "No space left on device", tail=["line one", "line two"])
    row = history.run(1)
    assert (row["state"], row["exit_code"], row["error"], row["attempts"]) == ("failed", 3, "No space left on device", 1)
    assert (row["seconds"], row["bytes_read"], row["peak_memory_bytes"]) == (7, 1000, 1 << 27)
    assert row["log"] == "line one\nline two"
    assert history.next() == 2


def test_they_are_listed_newest_first_by_state_and_so_many(history: History, stage: Stage) -> None:
    runs = stage.queue(*(unit(name) for name in "abc"))
    stage.start(runs[1])
    stage.end(runs[1])
    assert [row["name"] for row in history.runs()] == ["c", "b", "a"]
    assert [row["name"] for row in history.runs("done")] == ["b"]
    assert [row["name"] for row in history.runs(limit=2)] == ["c", "b"]
    with pytest.raises(BadInput, match="job 9: found none"):
        history.run(9)


def test_the_next_daemon_takes_up_what_one_was_at(history: History, stage: Stage) -> None:
    runs = stage.queue(unit("a"), unit("b", state="refused", error="no"), unit("c"), unit("d"))
    stage.start(runs[0])
    stage.end(runs[2])
    left = history.unfinished()
    assert [(number, taken.name, cause) for number, taken, cause in left] == [(1, "a", "nightly"), (4, "d", "nightly")]
    for number, _, _ in left:
        history.given_up(number)
    assert [row["state"] for row in history.runs()] == ["interrupted", "done", "refused", "interrupted"]
    assert history.run(1)["ended"] > 0
    assert history.unfinished() == []


def test_how_a_unit_ended_is_known_by_its_outputs_and_options(history: History, stage: Stage) -> None:
    done = unit("llama")
    assert history.ended_as(done) == ("", "")
    for code, error in ((3, "disk"), (0, "")):
        (run,) = stage.queue(done)
        stage.start(run)
        stage.end(run, code, error)
        assert history.ended_as(done) == ({3: "failed", 0: "done"}[code], error)
    assert history.ended_as(replace(done, options={**done.options, "tp_size": 2})) == ("", "")
    assert history.ended_as(replace(done, outputs=("/elsewhere",))) == ("", "")


def test_it_forgets_what_ended_long_ago_and_nothing_else(history: History, stage: Stage) -> None:
    old, new, waits = stage.queue(unit("old"), unit("new"), unit("waits"))
    for run in (old, new):
        stage.start(run)
        stage.end(run)
    assert old.ended
    old.ended -= 10 * DAY
    waits.queued -= 10 * DAY
    for run in (old, waits):
        history.save(run)
    history.forget(9)
    assert [row["name"] for row in history.runs()] == ["waits", "new"]
    assert history.next() == 4, "numbers are not given again"


def test_marks_are_kept(history: History, tmp_path: Path) -> None:
    assert history.mark("fired", "nightly") is None
    for value in ("1", "2"):
        history.set_mark("fired", "nightly", value)
    again = History(tmp_path / "history.db")
    assert (again.mark("fired", "nightly"), again.mark("arrived", "nightly")) == ("2", None)
    again.close()


def test_requests_are_taken_once_in_their_order(history: History, tmp_path: Path) -> None:
    reader = History(tmp_path / "history.db")
    for number in range(5):
        reader.ask("retry" if number % 2 else "cancel", number)
    (history.asked / ".half-written").write_text('{"action": "can')
    (history.asked / "0.json").write_text("not JSON")
    said = history.requests()
    assert [each for each in said if each] == [{"action": "retry" if n % 2 else "cancel", "number": n} for n in range(5)]
    assert history.requests() == []
    reader.close()


def test_it_is_for_its_owner_alone(history: History) -> None:
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.asked.stat().st_mode) == 0o700


def test_a_reader_changes_nothing_and_makes_nothing(stage: Stage, tmp_path: Path) -> None:
    stage.queue(unit())
    reader = History(tmp_path / "history.db")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.set_mark("fired", "x", "1")
    reader.close()
    with pytest.raises(BadInput, match="no such file"):
        History(tmp_path / "gone.db")
    assert not (tmp_path / "gone.db").exists()


@pytest.mark.parametrize("write", [False, True])
def test_what_is_no_history_is_refused(tmp_path: Path, write: bool) -> None:
    text, later, others = tmp_path / "text.db", tmp_path / "later.db", tmp_path / "others.db"
    text.write_text("no database at all, but long enough to be looked at as one" * 20)
    for path, change in ((later, "pragma user_version = 99"), (others, "create table jobs (id integer)")):
        made = sqlite3.connect(path)
        made.execute(change)
        made.commit()
        made.close()
    for path, found in ((text, "not a database"), (later, "version 99"), (others, "version 0"), (tmp_path, "--store")):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(BadInput, match=found):
            History(path, write=write)
        assert (path.read_bytes() if path.is_file() else b"") == before


def test_threads_write_at_once(history: History, stage: Stage) -> None:
    runs = stage.queue(*(unit(str(n)) for n in range(40)))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(history.save, runs))
    assert len(history.runs()) == 40


def test_one_daemon_alone(history: History, tmp_path: Path) -> None:
    again = History(tmp_path / "history.db", write=True)
    with history.only_one():
        assert holder(tmp_path / NOTE) == Holder.me()
        with pytest.raises(BadInput, match=rf"process {os.getpid()} on .*, a daemon on it"), again.only_one():
            pass
        assert holder(tmp_path / NOTE) == Holder.me(), "a refusal takes nobody's note away"
    assert not (tmp_path / NOTE).exists()
    with pytest.raises(ZeroDivisionError), again.only_one():
        raise ZeroDivisionError
    assert not (tmp_path / NOTE).exists()
    again.close()


def test_a_daemon_of_another_host_is_not_guessed_to_be_gone(history: History, tmp_path: Path) -> None:
    there = Holder("elsewhere", "its boot", 7, "x 1")
    (tmp_path / NOTE).symlink_to(json.dumps(asdict(there)))
    with pytest.raises(BadInput, match=r"process 7 on elsewhere.*headrace unlock"), history.only_one():
        pass
    assert holder(tmp_path / NOTE) == there


def test_without_locks_the_note_keeps_a_second_daemon_away(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with subprocess.Popen(["sleep", "60"]) as other:
        found = replace(Holder.me(), pid=other.pid, birth=birth(other.pid))
        (tmp_path / NOTE).symlink_to(json.dumps(asdict(found)))
        with pytest.raises(BadInput, match=f"process {other.pid} on"), history.only_one():
            pass
        other.kill()
    with history.only_one():
        assert holder(tmp_path / NOTE) == Holder.me()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "headrace/history.db"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the specification has ignored
    assert default_path() == Path.home() / ".local/state/headrace/history.db"

    def unknown(_: Path) -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(BadInput, match="--store: found nothing, and no home directory"):
        default_path()
