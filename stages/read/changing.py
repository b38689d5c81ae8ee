"""Sources that change while they are read: files that are looked at again, and downloads that seem to be under way.

A worker of a cluster may have copies of the files on its own disk, whose times and inodes are others. They are held against the
files of the process that asks for the conversion once, by their contents, and from then on against themselves.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.tensor.source_file import Seen, SourceFile

FRESH_SECONDS = 5.0  # a file that was written to so shortly before may still be
SPOT_BYTES = 4096
SPOTS = 2048  # in all files of a source, as each is a read of its own
LEAST_SPOTS, MOST_SPOTS = 4, 32  # in one file
_PARTIAL = re.compile(r"\.(incomplete|part|tmp|aria2|crdownload)$")  # of huggingface_hub, wget and curl, others, aria2, Chrome
_RSYNC = re.compile(r"\.(?P<name>.+)\.[A-Za-z0-9]{6}$")  # the name under which rsync receives a file
_HUB = Path(".cache/huggingface/download")  # where huggingface_hub receives the files of a directory

# In a worker: the copies on its machine, by the files that another machine has in their places.
_copies: dict[SourceFile, SourceFile] = {}


def changes(files: Iterable[SourceFile]) -> list[str]:
    """Look at a source's files again. Returns "PATH (what is not as it was)" for each that changed since it was opened.

    Where `unlike` has found copies of them here, these are looked at, as they were then.
    """
    return [f"{file.path} ({change})" for file in files if (change := _change(_copies.get(file, file)))]


def spots(files: Sequence[SourceFile]) -> list[str]:
    """A digest for each file, of its bytes in some places, as few bytes tell one set of weights from another.

    Raises OSError where a file cannot be read.
    """
    return [_spots(file.path, file.size_bytes, _count(files)) if file.seen else "" for file in files]


def unlike(files: Sequence[SourceFile], their_spots: Sequence[str]) -> list[str]:
    """Hold another machine's files against what is here in their places: the same files, on a shared disk, or copies of them.

    `their_spots`: the other machine's `spots` of them. Returns "PATH: what is different" for each that is neither. The times of
    copies may be others; from now on `changes` expects these files to stay as they are.
    """
    found = []
    for file, theirs in zip(files, their_spots, strict=True):
        _copies.pop(file, None)
        if not _change(file):
            continue
        copy = _copy(file, theirs, _count(files))
        if isinstance(copy, str):
            found.append(f"{file.path}: {copy}")
        else:
            _copies[file] = copy
    return found


def _copy(file: SourceFile, their_spots: str, count: int) -> SourceFile | str:
    """The file here that is a copy of another machine's, or how it is none."""
    assert file.seen
    try:
        with file.path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            head = opened.read(file.seen.head_bytes)
        if status.st_size != file.size_bytes:
            return f"{status.st_size:,} bytes, not {file.size_bytes:,}"
        if hashlib.sha256(head).hexdigest() != file.seen.head_sha256:
            return "another header"
        if _spots(file.path, file.size_bytes, count) != their_spots:
            return "other weights under the same header"
    except OSError as error:
        return error.strerror or str(error)
    seen = Seen(status.st_ino, status.st_ctime_ns, file.seen.head_bytes, file.seen.head_sha256)
    return SourceFile(file.path, status.st_size, status.st_mtime_ns, file.header_sha256, seen)


def _count(files: Sequence[SourceFile]) -> int:
    """The number of spots in each of some files."""
    return max(LEAST_SPOTS, min(MOST_SPOTS, SPOTS // max(len(files), 1)))


def _spots(path: Path, size_bytes: int, count: int) -> str:
    """A digest of `count` runs of SPOT_BYTES, evenly from the first byte of a file to the last."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        for spot in range(count):
            opened.seek(max(size_bytes - SPOT_BYTES, 0) * spot // (count - 1))
            digest.update(opened.read(SPOT_BYTES))
    return digest.hexdigest()


def moved(files: Iterable[SourceFile]) -> list[str]:
    """Look at a source's files again, as `changes`, but open those alone whose times, size or inode are not as they were."""
    return changes(file for file in files if not _untouched(file))


def _untouched(file: SourceFile) -> bool:
    """Whether nothing has happened to a file, by its state: nobody can set the time of its last change back."""
    if file.seen is None:
        return True
    try:
        status = file.path.stat()
    except OSError:
        return False
    now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return now == (file.size_bytes, file.mtime_ns, file.seen.changed_ns, file.seen.inode)


def _change(file: SourceFile) -> str:
    if file.seen is None:
        return ""
    try:
        with file.path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            head = opened.read(file.seen.head_bytes)
    except OSError as error:
        return error.strerror or str(error)
    if status.st_size != file.size_bytes:
        return f"{status.st_size:,} bytes, and had {file.size_bytes:,}"
    if hashlib.sha256(head).hexdigest() != file.seen.head_sha256:
        return "another header"
    if status.st_mtime_ns != file.mtime_ns:
        return "written to since"
    # Some network file systems give a file another inode each time that it is looked up: then its own times are the same.
    if status.st_ino != file.seen.inode and status.st_ctime_ns != file.seen.changed_ns:
        return "another file of that name"
    return ""


def arriving(location: Path, files: Iterable[SourceFile]) -> list[str]:
    """Say which files of a source seem to be written or downloaded still, by their age and by what lies beside them.

    `location`: the source, a file or a directory.
    """
    real = [file for file in files if file.seen]
    now = time.time()
    fresh = [file.path.name for file in real if 0 <= now - file.mtime_ns / 1e9 < FRESH_SECONDS]
    notes = []
    if fresh:
        count = f"{fresh[0]} was" if len(fresh) == 1 else f"{len(fresh)} files of the source ({fresh[0]}, ...) were"
        notes.append(f"{count} written to in the last {FRESH_SECONDS:.0f} seconds: a download may be under way")
    only = {location.name, location.resolve().name} if location.is_file() else None
    partial = sorted({path.name for path in _partial({file.path for file in real}, only)})
    if partial:
        more = f" and {len(partial) - 1} more" if len(partial) > 1 else ""
        notes.append(f"{partial[0]}{more} beside the source: a download may be under way, or have been broken off")
    return notes


def _partial(paths: Iterable[Path], only: set[str] | None) -> Iterator[Path]:
    """The files of unfinished downloads beside some files; `only`: those whose names begin with one of these."""
    names = {path.name for path in paths}
    beside = {parent for path in paths for parent in (path.parent, path.resolve().parent)}
    for directory in sorted({*beside, *(parent / _HUB for parent in beside)}):
        try:
            found = list(directory.iterdir())
        except OSError:
            continue
        for path in found:
            received = _RSYNC.match(path.name)
            ours = only is None or path.name.startswith(tuple(only))
            if (_PARTIAL.search(path.name) and ours) or (received and received["name"] in names):
                yield path
