"""The journal of an unfinished conversion: which tasks are done, so that an interrupted run loses only seconds of work.

It is a text file with one JSON object on each line, preceded by the object's checksum; a torn last line is dropped. The first line
names the job. The file is locked while a job works on what it describes; the lock ends with the process that holds it, whose name
is beside it (hold.py).

What a killed process has written is still in the system's page cache, but a power cut loses it. So every line names the boot in
which it was written, and every SYNC_SECONDS, while tasks go on, all files are flushed to disk and a line says so: also those that
an earlier process wrote, as the line speaks for all lines before it. After a reboot only the lines before the last such line count.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.documents import parse_json
from pipeline.sinks.hold import boot_id, busy, holder, leave, place, take
from pipeline.sinks.syncing import sync_directory, sync_files, sync_names
from pipeline.tensor.filesystem import try_lock
from pipeline.tensor.system_errors import naming

if TYPE_CHECKING:
    from stages.write import Written

SYNCED: Mapping[str, Any] = {"done": [], "sums": [], "synced": True}
COMMIT_SECONDS = 1.0  # between two commits: the work that a killed process may lose
SYNC_SECONDS = 10.0  # between two flushes to disk: the work that a power cut may lose


class Journal:
    """An open, locked journal. `owner`: the object on its first line, None where it was empty; `entries`: those on later lines.

    `locked`: False where its file system has no locks, so that the note alone keeps another job away.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock the file; create it where it does not exist. Raises BadInput where another job has locked it."""
        self.path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self.locked = try_lock(self._file, path)
            except BlockingIOError:
                os.close(self._file)
                raise busy(path, holder(place(path))) from None
            except OSError:
                os.close(self._file)
                raise
            # The job that had it locked may have removed it in the meantime.
            if path.exists() and os.fstat(self._file).st_ino == path.stat().st_ino:
                break
            os.close(self._file)
        try:
            take(path, self.locked)
        except BaseException:  # the note is another's, who may be in this process
            os.close(self._file)
            raise
        self.owner, self.entries = self._read()

    def start(self, owner: Mapping[str, Any]) -> None:
        """Empty the journal and write `owner` as its first line."""
        with naming(self.path):
            os.ftruncate(self._file, 0)
            if self.entries:  # which would speak for files that are about to be made anew
                os.fdatasync(self._file)
        self.append(owner)
        self.owner, self.entries = dict(owner), []

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line with this object. It is in the page cache when this returns, not necessarily on disk."""
        text = json.dumps({**entry, "boot": boot_id()}, separators=(",", ":"))
        os.lseek(self._file, 0, os.SEEK_END)
        data = memoryview(f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode())
        with naming(self.path):
            while data:
                data = data[os.write(self._file, data) :]
        self.entries.append(dict(entry))

    def synced(self) -> None:
        """Add the line that says that everything before it is on disk, and flush the journal itself."""
        self.append(SYNCED)
        with naming(self.path):
            os.fdatasync(self._file)

    def close(self) -> None:
        """Close and unlock the file; closing it twice does no harm."""
        if self._file >= 0:
            leave(self.path)
            os.close(self._file)
            self._file = -1

    @property
    def closed(self) -> bool:
        """Whether it is closed, so that what it describes may be another job's."""
        return self._file < 0

    def remove(self) -> None:
        """Delete the file and unlock it."""
        leave(self.path)
        self.path.unlink(missing_ok=True)
        self.close()

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        with naming(self.path):
            size = os.fstat(self._file).st_size
            owner, entries, valid_bytes = told(os.pread(self._file, size, 0))
            os.ftruncate(self._file, valid_bytes)
        return owner, entries


def told(data: bytes) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """The owner that a journal names, the entries that are certainly true of the files on disk, and the bytes of these lines."""
    lines = data.split(b"\n")
    entries: list[dict[str, Any]] = []
    sure = 0
    for line in lines[:-1]:
        found = _parsed(line, first=not entries)
        if found is None:
            break
        entries.append(found)
        boot = found.pop("boot")
        # What was written in this boot, or flushed, is there. The first line only names the job, so it always counts.
        if boot == boot_id() or entries[-1] == SYNCED or len(entries) == 1:
            sure = len(entries)
    valid_bytes = sum(len(line) + 1 for line in lines[:sure])
    return (entries[0], entries[1:sure], valid_bytes) if entries else (None, [], 0)


def look(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """A journal's owner and entries, without its lock and unchanged; nothing where there is none. Raises OSError."""
    try:
        owner, entries, _ = told(path.read_bytes())
    except FileNotFoundError:
        return None, []
    return owner, entries


def first_line(path: str) -> bytes:
    """The first line of a journal, which names its job; empty where there is none, or not all of it yet."""
    try:
        with Path(path).open("rb") as file:
            line = file.readline()
    except OSError:
        return b""
    return line if line.endswith(b"\n") else b""


def _parsed(line: bytes, first: bool) -> dict[str, Any] | None:
    """The object of a line; None where it is torn, or no line of a journal. The first names a job, and no tasks."""
    digest, _, text = line.partition(b" ")
    if xxhash.xxh3_64_hexdigest(text).encode() != digest:
        return None
    try:
        value = parse_json(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("boot"), str):
        return None
    known = _numbers(value.get("done")) and _sums(value.get("sums")) and _uploaded(value)
    return value if first or known else None


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _sums(values: Any) -> bool:
    """Whether these are the checksums of an entry: [rank or chunk, offset, bytes, xxh3] of each part."""
    return isinstance(values, list) and all(
        isinstance(each, list) and [type(value) for value in each[1:]] == [int, int, str] and type(each[0]) in (int, str)
        for each in values
    )


def _uploaded(value: dict[str, Any]) -> bool:
    """Whether what an entry says of uploads is that: ids, and [rank, part, ETag, task] of each part."""
    ids, parts = value.get("uploads", []), value.get("parts", [])
    return (
        isinstance(ids, list)
        and isinstance(parts, list)
        and all(isinstance(each, list) and [type(value) for value in each] == [int, int, str, int] for each in parts)
    )


def boot_mark() -> str:
    """A name of the current boot that says nothing of the machine, to be kept in files that travel; "" where there is none."""
    return xxhash.xxh3_64_hexdigest(boot_id().encode()) if boot_id() else ""


def entry(written: Sequence[Written], sink: int) -> dict[str, Any]:
    """Return a journal entry: the numbers of finished tasks, the checksums of what they wrote to a sink, by rank or by chunk, and
    what a store answered for the parts that they uploaded.

    `sink`: its position among those written.
    """
    sums = [[c.chunk or c.rank, c.offset, c.nbytes, c.xxh3] for each in written for c in each.checksums if c.sink == sink]
    parts = [[part.rank, part.number, part.etag, each.number] for each in written for part in each.parts if part.sink == sink]
    return {"done": [each.number for each in written], "sums": sums, **({"parts": parts} if parts else {})}


class Committer:
    """A thread that writes finished tasks into the journals every COMMIT_SECONDS, and flushes all files every SYNC_SECONDS."""

    def __init__(self, journals: Mapping[int, Journal], earlier: Iterable[str] = ()) -> None:
        """`journals`: by the position of their sink among those being written, which is what `Checksum.sink` names.

        `earlier`: the files of which the journals' entries speak already; whoever wrote them may not have flushed them.
        """
        self.journals = journals
        self._waiting: list[Written] = []
        self._unsynced: set[str] = set(earlier)
        self._uploaded = False  # parts, which a store has, and which the journal is to say after a power cut too
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="headrace-journal", daemon=True)

    def __enter__(self) -> Committer:
        self._thread.start()
        return self

    def add(self, written: Written) -> None:
        """Queue a finished task for the next commit. Raises the error that an earlier commit failed with."""
        if self._error:
            raise self._error
        with self._lock:
            self._waiting.append(written)

    def leave(self, journal: Journal) -> None:
        """Remove a journal whose sink is whole; the others go on."""
        with self._writing:
            self.journals = {sink: each for sink, each in self.journals.items() if each is not journal}
            journal.remove()

    def __exit__(self, *_: object) -> None:
        """Commit what is left, also after an error, so that the next run need not do it again."""
        self._stop.set()
        self._thread.join()
        if self._error:
            raise self._error
        self.commit()

    def commit(self) -> None:
        """Add an entry to every journal for the tasks that were queued since the last commit."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self._unsynced |= {path for written in waiting for path in written.paths}
        self._uploaded |= any(written.parts for written in waiting)
        with self._writing:
            for sink, journal in self.journals.items():
                journal.append(entry(waiting, sink))

    def sync(self) -> None:
        """Flush the files of all committed tasks to disk, and note that in every journal."""
        paths, self._unsynced = self._unsynced, set()
        uploaded, self._uploaded = self._uploaded, False
        if paths or uploaded:
            sync_files(paths, missing_ok=True)
            for directory in sorted({Path(path).parent for path in paths}):
                sync_directory(directory)
            for journal in self.journals.values():
                sync_names(journal.path.parent)
            with self._writing:
                for journal in self.journals.values():
                    journal.synced()

    def _work(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(COMMIT_SECONDS):
            try:
                self.commit()
                if time.monotonic() - last >= SYNC_SECONDS:
                    self.sync()
                    last = time.monotonic()
            except BaseException as error:
                self._error = error
                return
