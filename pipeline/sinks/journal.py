"""The journal of a conversion under way: which tasks are done, so that a run that was stopped loses seconds.

A text file of one JSON object a line, each behind its checksum; a torn last line is dropped. The first line says whose journal it
is. The file is locked while a job works on what it describes; the lock goes with the process that holds it.

A killed process loses nothing that it has written: the system still holds it. A power cut does. So every line names the boot that
it was written in, and from time to time, while tasks go on, all is brought to disk and a line says so. After another boot only
what stands before such a line counts.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.errors import BadInput, Problem

if TYPE_CHECKING:
    from stages.write import Checksum, Written

SYNCED: Mapping[str, Any] = {"done": [], "sums": [], "synced": True}
COMMIT_SECONDS = 1.0  # between two commits: what a killed process may cost
SYNC_SECONDS = 10.0  # between two times that all is brought to disk: what a power cut may cost


class Journal:
    """An open, locked journal: `owner` is its first line's object or None where it was empty, `entries` those that follow."""

    def __init__(self, path: Path) -> None:
        """Open and lock the file, creating it where it is not there. Raises BadInput where another job holds it."""
        self.path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._file)
                remedy = "Wait for it, or choose another directory"
                found, expected = "another job at work on it", "one job at a time"
                raise BadInput([Problem(str(path.parent), found, expected, remedy, passing=True)]) from None
            # The job that held it may have removed it in the meantime.
            if path.exists() and os.fstat(self._file).st_ino == path.stat().st_ino:
                break
            os.close(self._file)
        self.owner, self.entries = self._read()

    def start(self, owner: Mapping[str, Any]) -> None:
        """Forget everything and begin anew for `owner`."""
        os.ftruncate(self._file, 0)
        self.append(owner)
        self.owner, self.entries = dict(owner), []

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line."""
        text = json.dumps({**entry, "boot": boot_id()}, separators=(",", ":"))
        os.lseek(self._file, 0, os.SEEK_END)
        data = memoryview(f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode())
        while data:
            data = data[os.write(self._file, data) :]
        self.entries.append(dict(entry))

    def synced(self) -> None:
        """Say that everything before is on disk, and have that on disk."""
        self.append(SYNCED)
        os.fdatasync(self._file)

    def close(self) -> None:
        """Let go of the file; closing it twice does no harm."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Remove the file and let go of it."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        size = os.fstat(self._file).st_size
        lines = os.pread(self._file, size, 0).split(b"\n")
        entries: list[dict[str, Any]] = []
        good = sure = 0
        for line in lines[:-1]:
            digest, _, text = line.partition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() != digest:
                break
            entries.append(json.loads(text))
            good += len(line) + 1
            boot = entries[-1].pop("boot")
            # The first line alone promises nothing; what this boot wrote, or was brought to disk, is there.
            if boot == boot_id() or entries[-1] == SYNCED or len(entries) == 1:
                sure = len(entries)
        if sure < len(entries):
            good = sum(len(line) + 1 for line in lines[:sure])
        os.ftruncate(self._file, good)
        return (entries[0], entries[1:sure]) if entries else (None, [])


def boot_id() -> str:
    """A name for the time since the machine was started; "" where the system gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def entry(numbers: Sequence[int], checksums: Iterable[Checksum]) -> dict[str, Any]:
    """A journal line: tasks that are done, and the checksums of what they wrote."""
    return {"done": list(numbers), "sums": [[c.rank, c.offset, c.nbytes, c.xxh3] for c in checksums]}


class Committer:
    """Writes finished tasks into the journals, a group every second, and brings all to disk now and then, while others run."""

    def __init__(self, journals: Mapping[int, Journal]) -> None:
        """`journals`: by the place of their sink among those that are written, as checksums name it."""
        self.journals = journals
        self._waiting: list[Written] = []
        self._unsynced: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="headrace-journal", daemon=True)

    def __enter__(self) -> Committer:
        self._thread.start()
        return self

    def add(self, written: Written) -> None:
        """Take in a finished task. Raises what an earlier commit failed with."""
        if self._error:
            raise self._error
        with self._lock:
            self._waiting.append(written)

    def __exit__(self, *_: object) -> None:
        """Commit what is left, also after an error: the next run need not do it again."""
        self._stop.set()
        self._thread.join()
        if self._error:
            raise self._error
        self.commit()

    def commit(self) -> None:
        """Say in every journal what has been done since the last time."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        self._unsynced |= {path for written in waiting for path in written.paths}
        numbers = [written.number for written in waiting]
        for sink, journal in self.journals.items():
            journal.append(entry(numbers, [c for written in waiting for c in written.checksums if c.sink == sink]))

    def sync(self) -> None:
        """Have all that is committed on disk, and say so."""
        paths, self._unsynced = self._unsynced, set()
        if paths:
            sync_files(paths)
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


def sync_files(paths: Iterable[str | Path]) -> None:
    """Have the contents of files on disk."""
    for path in sorted(map(str, paths)):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
