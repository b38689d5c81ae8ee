"""The tables of the store, and the file that holds them: SQLite, whose schema has a version.

WAL, so that readers wait for nobody. `synchronous=NORMAL`: a killed process loses nothing that it has committed, as the system
still holds it. A power cut may take the last transactions, and nothing is wrong then: a run that was done is done again and found
up to date, and of one that was under way the process is gone too.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pipeline.errors import BadInput, Problem

VERSION = 1
APPLICATION_ID = 0x68656164  # "head": `file jobs.db` shows it
BUSY_MILLISECONDS = 30_000

metadata = sa.MetaData()

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("birth", sa.String, nullable=False),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("heartbeat", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String, nullable=False, unique=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("outputs", sa.JSON, nullable=False),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("cause", sa.String, nullable=False),
    sa.Column("queue", sa.String, nullable=False),
    sa.Column("resources", sa.JSON, nullable=False),
    sa.Column("queued", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("ended", sa.Float),
    sa.Column("not_before", sa.Float, nullable=False, default=0.0),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("exit_code", sa.Integer),
    sa.Column("error", sa.String, nullable=False, default=""),
    sa.Column("bytes_done", sa.Integer, nullable=False, default=0),
    sa.Column("bytes_total", sa.Integer, nullable=False, default=0),
    sa.Column("room", sa.JSON, nullable=False, default=dict),
    sa.Column("peak_memory_bytes", sa.Integer, nullable=False, default=0),
    sa.Column("scratch", sa.JSON, nullable=False, default=list),
    sa.Column("parts", sa.JSON, nullable=False, default=list),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sqlite_autoincrement=True,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run", sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("worker", sa.ForeignKey("workers.id"), nullable=False),
    sa.Column("pid", sa.Integer),
    sa.Column("birth", sa.String, nullable=False, default=""),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("outcome", sa.String),
    sa.Column("exit_code", sa.Integer),
    sa.Column("error", sa.String, nullable=False, default=""),
    sa.Column("seconds", sa.Float),
    sa.Column("bytes_read", sa.Integer, nullable=False, default=0),
    sa.Column("bytes_written", sa.Integer, nullable=False, default=0),
    sa.Column("peak_memory_bytes", sa.Integer, nullable=False, default=0),
    sa.Column("by_stage", sa.JSON, nullable=False, default=dict),
    sa.UniqueConstraint("run", "number"),
    # The database itself refuses a second attempt of a run while one is under way.
    sa.Index("one_open_attempt", "run", unique=True, sqlite_where=sa.text("outcome IS NULL")),
    sqlite_autoincrement=True,
)

# A row stays when its lease is given back: its token, which only grows, says that a later holder is another.
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("resource", sa.String, primary_key=True),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("attempt", sa.ForeignKey("attempts.id", ondelete="SET NULL")),
    sa.Column("expires", sa.Float, nullable=False),
)

triggers = sa.Table(
    "triggers",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("fired", sa.Float, nullable=False),
)

arrivals = sa.Table(
    "arrivals",
    metadata,
    sa.Column("watch", sa.String, primary_key=True),
    sa.Column("place", sa.String, primary_key=True),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("found", sa.Float, nullable=False),
)


def open_database(path: Path) -> sa.Engine:
    """Open the file, or create it with its directory. A transaction takes the write lock at once, unless it says `readonly`.

    Raises BadInput where it cannot be opened, is no store of headrace's, or has the schema of a later version.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput([Problem(str(path), error.strerror or "an error", "a directory that can be written")]) from None
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_MILLISECONDS / 1000})
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    try:
        with engine.begin() as connection:
            _check_version(connection, path)
        # Outside of a transaction, and only now that the file is known to be ours.
        raw = engine.raw_connection()
        raw.cursor().execute("PRAGMA journal_mode=WAL")
        raw.close()
    except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
        engine.dispose()
        found = f"a file that cannot be used ({getattr(error, 'orig', error)})"
        raise BadInput([Problem(f"--store {path}", found, "a store of headrace's")]) from None
    except BadInput:
        engine.dispose()
        raise
    return engine


def _configure(connection: Any, _record: Any) -> None:
    # The driver's own transactions begin late and without the write lock: SQLAlchemy's hook below begins them.
    connection.isolation_level = None
    for setting in ("foreign_keys=ON", f"busy_timeout={BUSY_MILLISECONDS}", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later could not be given the lock any more where another has written in between.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("readonly") else "BEGIN IMMEDIATE")


def _check_version(connection: sa.Connection, path: Path) -> None:
    found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("user_version", "application_id")}
    if found == {"user_version": 0, "application_id": 0} and not sa.inspect(connection).get_table_names():
        metadata.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version={VERSION}")
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
    elif found["application_id"] != APPLICATION_ID:
        raise BadInput([Problem(f"--store {path}", "a database of another program", "a store of headrace's, or a new file")])
    elif found["user_version"] != VERSION:
        remedy = "Use the version of headrace that made it, or name another --store"
        raise BadInput([Problem(f"--store {path}", f"schema {found['user_version']}", f"schema {VERSION}", remedy)])
