"""The checksums of an output: collected from its journal when it is made whole, and held against its files where it is in doubt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.tensor.mapping import file_bytes
from pipeline.tensor.tensors import Companion

if TYPE_CHECKING:
    from pipeline.sinks.rank_file import RankFile, RankFileTensor

PIECE_BYTES = 4 << 20  # mapped and summed at a time

Sums = dict[str, dict[str, list[list[Any]]]]


def output_sums(files: Sequence[RankFile], entries: Iterable[Mapping[str, Any]]) -> Sums:
    """Collect {file: {tensor: [[bytes, xxh3], ...]}} from a journal's entries, for a tensor's parts in order.

    Where a tensor has a single part, that is the plain xxh3 of its bytes. Raises RuntimeError for a part that belongs to no tensor.
    """
    parts: dict[int, dict[int, tuple[int, str]]] = defaultdict(dict)
    for entry in entries:
        for rank, offset, nbytes, digest in entry["sums"]:
            parts[rank][offset] = (nbytes, digest)
    result = {}
    for rank, file in enumerate(files):
        sums = {name: _tensor_checksum(tensor, parts[rank]) for name, tensor in file.tensors.items()}
        if parts[rank]:
            raise RuntimeError(f"{file.path}: {len(parts[rank])} parts were written that belong to no tensor")
        result[file.path.name] = sums
    return result


def as_written(files: Sequence[RankFile], sums: Any) -> bool:
    """Whether rank files that have their final names hold the headers and bytes that were written, by `sums` of `output_sums`.

    Reads all of them, PIECE_BYTES at a time. Raises OSError where one cannot be read.
    """
    return isinstance(sums, Mapping) and all(_file_as_written(file, sums.get(file.path.name)) for file in files)


def copied_as_they_are(copies: Iterable[Companion], directory: Path) -> bool:
    """Whether files were copied to a directory as they are. Raises OSError where one cannot be read."""
    return all(path.read_bytes() == (directory / path.name).read_bytes() for path in copies)


def _file_as_written(file: RankFile, sums: Any) -> bool:
    if not isinstance(sums, Mapping) or sums.keys() != file.tensors.keys():
        return False
    with file.path.open("rb") as opened:
        if opened.read(len(file.header)) != file.header:
            return False
        for name, tensor in file.tensors.items():
            start = tensor.offset
            for nbytes, digest in sums[name]:
                computed, stop = xxhash.xxh3_64(), start + nbytes
                while start < stop:
                    end = min(start + PIECE_BYTES, stop)
                    computed.update(file_bytes(opened.fileno(), str(file.path), start, end).data)
                    start = end
                if computed.hexdigest() != digest:
                    return False
            if start != tensor.offset + tensor.nbytes:
                return False
    return True


def _tensor_checksum(tensor: RankFileTensor, parts: dict[int, tuple[int, str]]) -> list[list[Any]]:
    """Remove a tensor's parts from `parts` (by offset in the file), and return their [bytes, xxh3] in order."""
    result: list[list[Any]] = []
    offset, end = tensor.offset, tensor.offset + tensor.nbytes
    while offset < end and offset in parts:
        nbytes, digest = parts.pop(offset)
        result.append([nbytes, digest])
        offset += nbytes
    if offset < end:
        # Padding rows at the end are never written: they are the zeros of the reserved file.
        padding = xxhash.xxh3_64()
        for start in range(offset, end, 1 << 20):
            padding.update(bytes(min(1 << 20, end - start)))
        result.append([end - offset, padding.hexdigest()])
    return result
