"""Check the CRC-32 of each record of zip archives of torch.save, which reading them leaves alone as it reads no file whole."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import Problem
from stages.read.torch_archive import Archive, shown

PIECE_BYTES = 4 << 20  # read at once


def check_crcs(paths: Iterable[Path]) -> tuple[list[Problem], int]:
    """Read all records of those files that are zip archives and hold them against the checksums in the archives' directories.

    Returns a problem for each archive with records that differ, and the number of archives that have checksums: one that torch was
    told to save without (`set_crc32_options(False)`) has 0 for every record. Raises BadInput, ValueError and zipfile's errors for
    what is no archive of torch.save any more, and OSError where a file cannot be read.
    """
    problems, archives = [], 0
    for path in paths:
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":
                continue
            archive = Archive(path, file, os.fstat(file.fileno()).st_size)
            if not any(entry.CRC for entry in archive.entries.values()):
                continue
            archives += 1
            wrong = list(_wrong(archive, file))
        if wrong:
            found = f"{len(wrong)} of {len(archive.entries)} records with another CRC-32, the first {shown(wrong[0])}"
            expected = "the CRC-32 that its directory has of each"
            problems.append(Problem(str(path), found, expected, "The file is damaged: fetch it again"))
    return problems, archives


def _wrong(archive: Archive, file: BinaryIO) -> Iterator[str]:
    for name, entry in archive.entries.items():
        start, left = archive.locate(name)
        file.seek(start)
        found = 0
        while left and (piece := file.read(min(left, PIECE_BYTES))):
            found, left = zlib.crc32(piece, found), left - len(piece)
        if left or found != entry.CRC:
            yield name
