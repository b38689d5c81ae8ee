"""Which process is at work on an output in object storage: a note beside it, written on the condition that there is none.

As `pipeline.sinks.hold` has it for directories: one whose process is known to be gone is passed over, another host's is not guessed
to be gone. Where a store knows no conditional writes, the note alone keeps other jobs away.
"""

from __future__ import annotations

import json
import uuid
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
        try:
            put_object(_place(directory), words, "absent")
            return words
        except FileExistsError:
            found = _said(directory)
        if found is None:  # it is removed just now
            continue
        holder, etag, data = found
        if data == words:  # a request that was made again, after its answer was lost
            return words
        if holder is None or not holder.gone:
            raise busy(directory / NOTE, holder)
        try:
            put_object(_place(directory), words, etag)
            return words
        except (FileExistsError, FileNotFoundError):
            continue
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


def _place(directory: Path) -> str:
    return str(directory / NOTE)


def _said(directory: Path) -> tuple[Holder | None, str, bytes] | None:
    """The process that a note names, its ETag and its text; None where there is no note."""
    found = read_object_at(_place(directory))
    if found is None:
        return None
    data, etag = found
    try:
        said = parse_json(data)
        holder = Holder(str(said["host"]), str(said["boot"]), int(said["pid"]), str(said["birth"]))
    except (ValueError, KeyError, TypeError):
        return None, etag, data
    return holder, etag, data
