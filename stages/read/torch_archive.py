"""Find the records in a zip archive of torch.save, and refuse archives whose records cannot be memory-mapped."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import BadInput, Problem

MAX_VERSION = 10  # of the format: the latest that torch reads
MAX_DIRECTORY_BYTES = 32 << 20  # some 400,000 records
RESAVE = "Load it with torch, and save the state_dict() alone with torch.save"


class _Directory:
    """A file for zipfile that refuses a directory of more than MAX_DIRECTORY_BYTES, which zipfile would read into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a zip archive with a directory of {count:,} bytes")
        return self.file.read(count)


class Archive:
    """An archive of torch.save: its `entries` by name, without the folder that all are in.

    Raises BadInput where it is another kind of archive or its records are compressed or encrypted, ValueError and zipfile's errors
    where it is damaged.
    """

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.file, self.file_bytes = file, file_bytes
        directory: Any = _Directory(file)  # read, seek and tell are all that zipfile needs
        with zipfile.ZipFile(directory) as archive:
            entries = archive.infolist()
        names = [entry.filename for entry in entries]
        pickled = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickled) != 1:
            found = f"a zip archive of {len(names)} records, {len(pickled) or 'none'} of them */data.pkl"
            raise BadInput([Problem(str(path), found, "an archive of torch.save, with one")])
        folder = pickled[0].removesuffix("data.pkl")
        self.entries = {entry.filename.removeprefix(folder): entry for entry in entries if entry.filename.startswith(folder)}
        if any(name == "constants.pkl" or name.startswith("code/") for name in self.entries):
            raise BadInput([Problem(str(path), "a TorchScript archive", "a state dict", RESAVE)])
        if len(set(names)) < len(names):
            raise ValueError("a zip archive with a record that stands twice")
        encrypted = [entry.filename for entry in entries if entry.flag_bits & 1]
        packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size]
        for found, which in (("encrypted", encrypted), ("compressed", packed)):
            if which:
                remedy = "Unpack it, and pack it again without either (zip -0)"
                raise BadInput([Problem(f"{path}: {shown(which[0])}", f"{found} data", "data stored as they are", remedy)])
        order, version = self._text("byteorder", "little"), self._text("version", "3")
        if order != "little":
            raise BadInput([byte_order(path, f"byteorder {shown(order)}")])
        if not version.isdecimal() or int(version) > MAX_VERSION:
            raise BadInput([Problem(f"{path}: version", shown(version), f"a format of version {MAX_VERSION} or before")])

    def locate(self, name: str) -> tuple[int, int]:
        """Return the offset of a record's first byte in the file, and its size. Raises ValueError where it is not there."""
        entry = self.entries[name]
        encoded = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        self.file.seek(max(entry.header_offset, 0))
        header = self.file.read(30 + len(encoded))
        # Use the lengths in the local header: torch pads it with extra fields to align data, which the directory does not have.
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", header[:30])
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        if entry.header_offset < 0 or signature != b"PK\3\4" or header[30:] != encoded or name_bytes != len(encoded):
            raise ValueError(f"a zip archive without {name} where its directory says that it is")
        if start + entry.file_size > self.file_bytes:
            raise ValueError(f"a zip archive cut short in {name}")
        return start, entry.file_size

    def _text(self, name: str, default: str) -> str:
        """Return the text of a short record, at most 64 bytes; `default` where there is none."""
        if name not in self.entries:
            return default
        start, size = self.locate(name)
        self.file.seek(start)
        return self.file.read(min(size, 64)).decode().strip()


def shown(text: str) -> str:
    """Return text of a file as messages show it: printable, and at most 200 characters."""
    return (text if text.isprintable() else ascii(text))[:200]


def byte_order(path: Path, found: str) -> Problem:
    """Return the problem of a big-endian file: bytes are not swapped while they are read."""
    return Problem(str(path), found, "a file of a little-endian machine", "Save it again on one")
