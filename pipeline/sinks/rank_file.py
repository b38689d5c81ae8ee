"""rank_file: the layout of rank{N}.safetensors, known before a byte is written, as the safetensors library writes it.

Facts: TensorRT-LLM checkpoint format, section 1.
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


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where a tensor lies in a rank file: byte offset from the file's start, shape and dtype (TensorRT-LLM's name).

    `stored`: the shape and dtype by which placements count.
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
        """The contiguous runs of bytes that hold a region of the tensor."""
        shape, dtype = self.stored
        itemsize = BY_TARGET[dtype].numpy.itemsize
        for first, part in contiguous(shape, region):
            yield Located(self.path, self.offset + first * itemsize, part)


@dataclass(frozen=True)
class RankFile:
    """A rank's file: its header and the place of each tensor. It is named `*.partial` until it is whole."""

    path: Path
    header: bytes
    tensors: dict[str, FileTensor]
    size_bytes: int

    @property
    def partial(self) -> Path:
        """The name that the file has until it is whole."""
        return partial_name(self.path)

    def create(self) -> None:
        """Reserve the file's size on disk and write its header. Raises OSError where the disk has no room."""
        reserve(self.partial, self.size_bytes)
        with self.partial.open("r+b") as file:
            file.write(self.header)

    def begun(self) -> bool:
        """Whether an earlier run left the file as `create` makes it, or already gave it its name; then it is partial again."""
        if not self.partial.exists() and self.path.exists():
            self.path.replace(self.partial)
        try:
            with self.partial.open("rb") as file:
                return os.fstat(file.fileno()).st_size == self.size_bytes and file.read(len(self.header)) == self.header
        except OSError:
            return False

    def finish(self) -> None:
        """Give the whole file its name."""
        self.partial.replace(self.path)


def partial_name(path: Path) -> Path:
    """A file's name while it is being written."""
    return path.with_name(path.name + ".partial")


def rank_file(path: Path, tensors: Sequence[RankTensor]) -> RankFile:
    """Lay out a file: tensors sorted by type (widest first), then by name; the header padded with spaces to 8 bytes."""
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
        tensor.name: FileTensor(
            partial, len(header) + start, tensor.shape, tensor.dtype, tensor.stored or (tensor.shape, tensor.dtype)
        )
        for tensor, start in zip(ordered, offsets, strict=True)
    }
    return RankFile(path, header, located, len(header) + offset)
