"""Lay out rank{N}.safetensors before a byte is written, in the order in which the safetensors library writes it.

Facts: docs/format/checkpoint.md, section 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.model.dtypes import BY_TARGET, FILE_ORDER
from pipeline.sinks.reserve import reserve
from pipeline.tensor.placement import Located, RankTensor, Region, contiguous
from pipeline.tensor.remote_path import RemotePath
from pipeline.tensor.system_errors import naming
from stages.write.open_files import PARTIAL


@dataclass(frozen=True, slots=True)
class RankFileTensor:
    """A tensor's place in a rank file: byte offset from the file's start, shape, and dtype by TensorRT-LLM's name.

    `stored`: the shape and dtype that regions passed to `locate` refer to; they differ from `shape` and `dtype` where the
    file has the same bytes under another type.
    """

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[tuple[int, ...], str]

    @property
    def itemsize(self) -> int:
        return BY_TARGET[self.dtype].numpy.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def locate(self, region: Region) -> Iterator[Located]:
        """Yield the contiguous runs of bytes that hold a region of the tensor, as `stored` counts it."""
        shape, dtype = self.stored
        itemsize = BY_TARGET[dtype].numpy.itemsize
        for first, part in contiguous(shape, region):
            yield Located(self.path, self.offset + first * itemsize, part)


@dataclass(frozen=True)
class RankFile:
    """The layout of a rank's file: its header and the place of each tensor. It is named `*.partial` until it is complete."""

    path: Path
    header: bytes
    tensors: dict[str, RankFileTensor]
    size_bytes: int

    @property
    def partial(self) -> Path:
        """The path that the file has until it is complete."""
        return partial_name(self.path)

    def create(self) -> None:
        """Reserve the file's size on disk and write its header. Raises OSError where the disk has no room."""
        reserve(self.partial, self.size_bytes)
        with naming(self.partial), self.partial.open("r+b") as file:
            file.write(self.header)

    def begun(self) -> bool:
        """Return whether an earlier run made the file with this header and size.

        A file that already has its final name is renamed back to `partial` first.
        """
        if not self.partial.exists() and self.path.exists():
            self.path.replace(self.partial)
        return self._made(self.partial)

    def is_begun(self) -> bool:
        """Whether `begun` would say so; nothing is renamed."""
        return self._made(self.partial if self.partial.exists() else self.path)

    def _made(self, path: Path) -> bool:
        """Whether a file has this header and size."""
        try:
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_size == self.size_bytes and file.read(len(self.header)) == self.header
        except OSError:
            return False

    def finish(self) -> None:
        """Rename the complete file to its final name; a file that has it already is left."""
        if self.partial.exists() or not self.path.exists():
            self.partial.replace(self.path)


def partial_name(path: Path) -> Path:
    """Return the path that a file has while it is being written; in object storage a file is there when it is whole."""
    if isinstance(path, RemotePath):
        return path
    return path.with_name(path.name + PARTIAL)


def rank_file(path: Path, tensors: Sequence[RankTensor]) -> RankFile:
    """Lay out a file: tensors sorted by dtype (in FILE_ORDER), then by name; the header is padded to 8 bytes with spaces."""
    rows = {tensor.name: BY_TARGET[tensor.dtype] for tensor in tensors}
    ordered = sorted(tensors, key=lambda tensor: (FILE_ORDER.index(rows[tensor.name].safetensors), tensor.name))
    entries, offsets, offset = {}, [], 0
    for tensor in ordered:
        row = rows[tensor.name]
        end = offset + math.prod(tensor.shape) * row.numpy.itemsize
        entries[tensor.name] = {"dtype": row.safetensors, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offsets.append(offset)
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    partial = str(partial_name(path))
    located = {
        tensor.name: RankFileTensor(
            partial, len(header) + start, tensor.shape, tensor.dtype, tensor.stored or (tensor.shape, tensor.dtype)
        )
        for tensor, start in zip(ordered, offsets, strict=True)
    }
    return RankFile(path, header, located, len(header) + offset)
