"""A file of a source, as it was when it was opened: what tells a changed file from an unchanged one, now and while it is read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Seen:
    """The state of a file when it was opened, which is looked at again when all of it has been read.

    `inode`, `changed_ns`: which file had the name, and when that was last written, renamed or linked (`st_ino`, `st_ctime_ns`).
    `head_bytes`, `head_sha256`: the SHA-256 of the first bytes of the file, such as its header.
    """

    inode: int
    changed_ns: int
    head_bytes: int
    head_sha256: str


@dataclass(frozen=True)
class SourceFile:
    """A file of a source as it was when it was opened: a changed source differs from it.

    `seen`: None where there is no such file, as of a model in memory.
    """

    path: Path
    size_bytes: int
    mtime_ns: int
    header_sha256: str
    seen: Seen | None = field(default=None, repr=False)

    def fingerprint(self) -> dict[str, Any]:
        """The file as plain values, by its name alone: a checkpoint may be moved."""
        values = {"size_bytes": self.size_bytes, "mtime_ns": self.mtime_ns, "header_sha256": self.header_sha256}
        return {"path": self.path.name, **values}


def source_file(path: Path, status: os.stat_result, head: bytes, header_sha256: str = "") -> SourceFile:
    """Note how a file is as it is opened.

    Parameters
    ----------
    status
        Of the file that was opened, taken before it was read.
    head
        The first bytes of the file: its header, where that comes first.
    header_sha256
        A digest of all that says where the tensors lie; "" for that of `head`.
    """
    digest = hashlib.sha256(head).hexdigest()
    seen = Seen(status.st_ino, status.st_ctime_ns, len(head), digest)
    return SourceFile(path, status.st_size, status.st_mtime_ns, header_sha256 or digest, seen)
