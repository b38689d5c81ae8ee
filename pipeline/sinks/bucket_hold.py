"""Which process is at work on an output in object storage: a note beside it, written on the condition that there is none.

As `pipeline.sinks.hold` has it for directories: one whose process is known to be gone is passed over, another host's is not guessed
to be gone. Where a store knows no conditional writes, the note alone keeps other jobs away.
"""

from __future__ import annotations

import errno
import json
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pipeline.documents import parse_json
from pipeline.errors import BadInput, Problem
from pipeline.sinks.hold import Holder, busy
from pipeline.tensor.bucket import put_object, read_object_at, remove_object

NOTE = "headrace.json.lock"


def take(directory: Path) -> bytes:
    """Note that this process is at work on an output; returns the words of its note, which no other note has.

    Raises BadInput where another process is at work on it, and OSError where the store fails.
    """
    words = json.dumps({**asdict(Holder.me()), "note": uuid.uuid4().hex}).encode()
    for _ in range(3):
        found = _said(directory)
        holder, which, _ = found or (None, "absent", b"")
        if found and (holder is None or not holder.gone):
            raise busy(directory / NOTE, holder)
        with suppress(FileExistsError, FileNotFoundError):  # another one was quicker, or this answer was lost and it asked again
            _put(directory, words, which)
        # Some stores do not look at conditions: the note that is there counts.
        if (found := _said(directory)) and found[2] == words:
            return words
    raise busy(directory / NOTE, None)


def leave(directory: Path, words: bytes) -> None:
    """Remove the note of these words, and no other."""
    found = _said(directory)
    if found and found[2] == words:
        remove_object(_place(directory))


def forget(directory: Path) -> None:
    """Remove the note of a process that is gone."""
    found = _said(directory)
    if found and found[0] and found[0].gone:
        remove_object(_place(directory))


def holder(directory: Path) -> Holder | None:
    """The process that a note beside an output names; None where there is none."""
    found = _said(directory)
    return found[0] if found else None


def release(directory: Path) -> Holder | None:
    """Remove the note of a process that is gone, and return whose it was; None where there is none.

    Raises BadInput where the process can be seen to run.
    """
    found = _said(directory)
    if not found:
        return None
    holder = found[0]
    if holder and holder.seen and not holder.gone:
        at_work = f"process {holder.pid} of this machine at work on it"
        raise BadInput([Problem(str(directory), at_work, "one that is gone", "Stop it, or wait for it")])
    remove_object(_place(directory))
    return holder


def _put(directory: Path, words: bytes, which: str) -> None:
    """Write a note on a condition, or without one where the store knows none."""
    try:
        put_object(_place(directory), words, which)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        put_object(_place(directory), words)


def _place(directory: Path) -> str:
    return str(directory / NOTE)


def _said(directory: Path) -> tuple[Holder | None, str, bytes] | None:
    """The process that a note names, which object the note is, and its text; None where there is no note."""
    found = read_object_at(_place(directory))
    if found is None:
        return None
    data, which = found
    try:
        said = parse_json(data)
        holder = Holder(str(said["host"]), str(said["boot"]), int(said["pid"]), str(said["birth"]))
    except (ValueError, KeyError, TypeError):
        return None, which, data
    return holder, which, data
