"""The record of a daemon, in a SQLite database that it alone writes: runs, when triggers fired, what watches have found.

It decides nothing: what is done is known from the outputs. A daemon that was killed finds here what it was at, and asks for it
again. `headrace jobs` reads it, and leaves requests (to cancel, to do again) in a directory beside it, for the daemon to take.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.documents import read_object
from pipeline.errors import BadInput, Problem
from pipeline.jobs.runs import ACTIVE, Run
from pipeline.jobs.units import Unit
from pipeline.planning.home import at_home
from pipeline.sinks import hold
from pipeline.tensor.filesystem import try_lock

SCHEMA = 2
DAY = 86_400.0
_TABLES = """
create table if not exists runs (number integer primary key, name text, source text, outputs text, cause text, state text,
    queued real, started real, ended real, attempts integer, exit_code integer, error text, bytes_done integer, bytes_total integer,
    seconds real, bytes_read integer, bytes_written integer, peak_memory_bytes integer, host text, page text, dashboard text,
    log text, unit text);
create table if not exists marks (kind text, name text, value text, primary key (kind, name));
"""


def default_path() -> Path:
    """Where the history is unless --store says otherwise: by the XDG Base Directory Specification.

    Raises BadInput where nobody knows the home directory.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if Path(state).is_absolute() else at_home("~/.local/state")
    except ValueError:
        found, remedy = "nothing, and no home directory that is known", "Give it, or set HOME or XDG_STATE_HOME"
        raise BadInput([Problem("--store", found, "a file for the history", remedy)]) from None
    return base / "headrace/history.db"


class History:
    """A history, opened to be read or written. Safe from any thread."""

    def __init__(self, path: Path, write: bool = False) -> None:
        """Raises BadInput where it is not there, cannot be opened, is none, or is a later version's."""
        self.path = path.absolute()
        self.asked = self.path.with_name(f"{self.path.name}.d")
        self._lock = threading.RLock()
        expected = "a history that `headrace serve` has made"
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.asked.mkdir(mode=0o700, exist_ok=True)
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            elif not self.path.exists():
                raise BadInput([Problem(f"--store {path}", "no such file", expected)])
            mode = "rw" if write else "ro"
            self._db = sqlite3.connect(f"{self.path.as_uri()}?mode={mode}", uri=True, check_same_thread=False, timeout=30)
            self._db.row_factory = sqlite3.Row
            version = self._db.execute("pragma user_version").fetchone()[0]
            if version == 0 and write and not self._db.execute("select 1 from sqlite_master").fetchone():
                self._db.executescript(f"pragma journal_mode = wal; {_TABLES} pragma user_version = {SCHEMA};")
            elif version != SCHEMA:
                raise BadInput([Problem(f"--store {path}", f"a database of version {version}", f"one of version {SCHEMA}")])
        except (OSError, sqlite3.Error) as error:
            raise BadInput([Problem(f"--store {path}", str(error), expected)]) from None

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """Be the one daemon on this history. Raises BadInput, naming the other, where one is at work, or may be on another host."""
        journal = self.path.with_name(f"{self.path.name}.serve")
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                hold.take(journal, try_lock(descriptor, journal))
            except BlockingIOError:
                found = hold.holder(hold.place(journal))
                who = f"process {found.pid} on {found.host}, a daemon on it" if found else "a daemon on it"
                raise BadInput([Problem(f"--store {self.path}", who, "none", "Stop it first, or give each a --store")]) from None
            try:
                yield
            finally:
                hold.leave(journal)
        finally:
            os.close(descriptor)

    def runs(self, state: str | None = None, limit: int = -1) -> list[dict[str, Any]]:
        """Runs, the newest first, as plain values."""
        where, values = ("where state = ?", [state]) if state else ("", [])
        with self._lock:
            rows = self._db.execute(f"select * from runs {where} order by number desc limit ?", [*values, limit]).fetchall()
        return [_values(row) for row in rows]

    def run(self, number: int) -> dict[str, Any]:
        """One run. Raises BadInput where there is none of that number."""
        with self._lock:
            row = self._db.execute("select * from runs where number = ?", [number]).fetchone()
        if row is None:
            raise BadInput([Problem(f"job {number}", "none of that number", "one that `headrace jobs` lists")])
        return _values(row)

    def next(self) -> int:
        """The number of the next run."""
        with self._lock:
            return int(self._db.execute("select coalesce(max(number), 0) + 1 from runs").fetchone()[0])

    def save(self, run: Run) -> None:
        """Record how a run stands."""
        values = {**run.as_json(), "log": "\n".join(run.log)[-65_536:], "unit": json.dumps(run.unit.as_json())}
        values["outputs"] = json.dumps(values["outputs"])
        with self._lock, self._db:
            self._db.execute(f"insert or replace into runs values ({', '.join(f':{name}' for name in values)})", values)

    def unfinished(self) -> list[tuple[int, Unit, str]]:
        """The numbers, units and causes of what a daemon was at when it ended, the oldest first."""
        with self._lock:
            marks = ", ".join("?" * len(ACTIVE))
            rows = self._db.execute(f"select * from runs where state in ({marks}) order by number", ACTIVE).fetchall()
        return [(row["number"], Unit.of(json.loads(row["unit"])), row["cause"]) for row in rows]

    def given_up(self, number: int) -> None:
        """Call a run interrupted that another was made for."""
        error = "the daemon that was at it is gone; it was asked for again"
        with self._lock, self._db:
            change = "update runs set state = 'interrupted', exit_code = 3, error = ?, ended = ? where number = ?"
            self._db.execute(change, [error, time.time(), number])

    def ended_as(self, unit: Unit) -> tuple[str, str]:
        """The state and error of the last run of a unit's source, outputs and options; ("", "") where there was none."""
        with self._lock:
            query = "select state, error, unit from runs where name = ? and source = ? and outputs = ? order by number desc limit 1"
            row = self._db.execute(query, [unit.name, unit.source, json.dumps(unit.outputs)]).fetchone()
        same = row is not None and json.loads(row["unit"])["options"] == dict(unit.options)
        return (row["state"], row["error"]) if same else ("", "")

    def mark(self, kind: str, name: str) -> str | None:
        """The last note of a trigger (`fired`) or a place that a watch looks at (`arrived`)."""
        with self._lock:
            row = self._db.execute("select value from marks where kind = ? and name = ?", [kind, name]).fetchone()
        return None if row is None else str(row[0])

    def set_mark(self, kind: str, name: str, value: str) -> None:
        """Note it."""
        with self._lock, self._db:
            self._db.execute("insert or replace into marks values (?, ?, ?)", [kind, name, value])

    def forget(self, days: float) -> None:
        """Drop runs that ended longer ago."""
        with self._lock, self._db:
            self._db.execute("delete from runs where ended < ?", [time.time() - days * DAY])

    def ask(self, action: str, number: int) -> None:
        """Leave a request for the daemon."""
        made = self.asked / f".{uuid.uuid4().hex}"
        made.write_text(json.dumps({"action": action, "number": number}))
        made.rename(self.asked / f"{time.time_ns()}.json")

    def requests(self) -> list[dict[str, Any]]:
        """Take the requests that were left, the first first."""
        found = []
        for file in sorted(self.asked.glob("*.json")):
            found.append(read_object(file))
            file.unlink(missing_ok=True)
        return found


def _values(row: sqlite3.Row) -> dict[str, Any]:
    return {**dict(row), "outputs": json.loads(row["outputs"]), "unit": json.loads(row["unit"])}
