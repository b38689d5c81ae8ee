"""write: read(write(x)) == x, whatever the order of the blocks.

A rank file is created at its full size with its header in place; blocks are then written at their offsets in any order. It is named
`*.partial` until it is whole. Layout of the file: as the safetensors library writes it (checkpoint-format, section 1).
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dtypes import BY_TARGET, FILE_ORDER
from pipeline.metering import collect, meter
from pipeline.placement import Placement, RankTensor, Region, extent, intersect, pieces, runs, shift, slices, whole
from pipeline.tensors import Block

_local = threading.local()


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where a tensor lies in a rank file: byte offset from the file's start, shape and dtype (TensorRT-LLM's name)."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_TARGET[self.dtype].numpy.itemsize


@dataclass(frozen=True)
class RankFile:
    """A rank's safetensors file: its header and the place of each tensor, known before a byte is written."""

    path: Path
    header: bytes
    tensors: dict[str, FileTensor]
    size_bytes: int

    @property
    def partial(self) -> Path:
        """The name that the file has until it is whole."""
        return self.path.with_name(self.path.name + ".partial")

    def create(self) -> None:
        """Reserve the file's size on disk and write its header. Raises OSError where the disk has no room."""
        descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self.size_bytes)
            else:
                os.ftruncate(descriptor, self.size_bytes)
            _write_all(descriptor, memoryview(self.header), 0)
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Give the whole file its name."""
        self.partial.replace(self.path)


def rank_file(path: Path, tensors: Sequence[RankTensor]) -> RankFile:
    """Lay out a file: tensors sorted by type (widest first), then by name; the header padded with spaces to 8 bytes."""
    rows = {tensor.name: BY_TARGET[tensor.dtype] for tensor in tensors}
    ordered = sorted(tensors, key=lambda tensor: (FILE_ORDER.index(rows[tensor.name].safetensors), tensor.name))
    entries, places, offset = {}, {}, 0
    for tensor in ordered:
        row = rows[tensor.name]
        end = offset + math.prod(tensor.shape) * row.numpy.itemsize
        entries[tensor.name] = {"dtype": row.safetensors, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        places[tensor.name] = offset
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    located = {tensor.name: FileTensor(len(header) + places[tensor.name], tensor.shape, tensor.dtype) for tensor in ordered}
    return RankFile(path, header, located, len(header) + offset)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A placement of a block, bound to its file: `source` region of the block -> `target` region of the tensor at `offset`."""

    path: str
    offset: int
    shape: tuple[int, ...]
    source: Region
    target: Region


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """What a task does with one source block: one list of deliveries for each target, and how it is cut into pieces.

    `itemsize` is that of the widest form that a value takes on its way.
    """

    name: str
    deliveries: tuple[tuple[Delivery, ...], ...]
    itemsize: int
    piece_bytes: int
    row_multiple: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a task did: bytes and seconds by stage, and the last module that it wrote."""

    name: str
    blocks: int
    bytes_read: int
    bytes_written: int
    metrics: dict[tuple[str, str], float]


def deliveries(
    placements: Sequence[Placement], region: Region, files: Sequence[RankFile], partial: bool = True
) -> tuple[Delivery, ...]:
    """The deliveries of the block at `region` of a source. Padding needs none: the file's reserved bytes are zeros."""
    result = []
    for placement in placements:
        if placement.source is None:
            continue
        common = intersect(placement.source, region)
        if common is None:
            continue
        file = files[placement.rank]
        place = file.tensors[placement.tensor]
        origin = [start for start, _ in placement.source]
        inner = shift(common, origin, -1)
        lead = len(placement.target) - len(inner)
        corner = [start for start, _ in placement.target]
        target = (*placement.target[:lead], *shift(inner, corner[lead:]))
        source = shift(common, [start for start, _ in region], -1)
        path = file.partial if partial else file.path
        result.append(Delivery(str(path), place.offset, place.shape, source, target))
    return tuple(result)


def write_blocks(work: Sequence[BlockWrite], blocks: Sequence[Sequence[Block]]) -> Written:
    """What a task runs: scatter source blocks to every rank of every target, a piece at a time.

    `blocks[i]` are the values of `work[i]` as each target wants them (the same source block, cast to each target's type).
    Raises OSError where reading or writing fails.
    """
    written = 0
    with collect() as metrics, ExitStack() as stack:
        descriptors: dict[str, int] = {}
        for item, versions in zip(work, blocks, strict=True):
            for piece in pieces(whole(versions[0].shape), item.itemsize, item.piece_bytes, item.row_multiple):
                for block, targets in zip(versions, item.deliveries, strict=True):
                    written += _write_piece(block, piece, targets, descriptors, stack)
        read = int(metrics.get(("read", "bytes"), 0))
        return Written(work[-1].name, len(work), read, written, dict(metrics))


def _write_piece(block: Block, piece: Region, targets: Sequence[Delivery], descriptors: dict[str, int], stack: ExitStack) -> int:
    written = 0
    values = None
    for delivery in targets:
        common = intersect(delivery.source, piece)
        if common is None:
            continue
        if values is None:
            values = block.read(piece)
        part = values[slices(shift(common, [start for start, _ in piece], -1))]
        inner = shift(common, [start for start, _ in delivery.source], -1)
        lead = len(delivery.target) - len(inner)
        corner = [start for start, _ in delivery.target]
        target = (*delivery.target[:lead], *shift(inner, corner[lead:]))
        if delivery.path not in descriptors:
            descriptors[delivery.path] = os.open(delivery.path, os.O_WRONLY)
            stack.callback(os.close, descriptors[delivery.path])
        write_region(descriptors[delivery.path], delivery.offset, delivery.shape, target, part)
        written += part.nbytes
    return written


def write_region(descriptor: int, offset: int, shape: tuple[int, ...], target: Region, values: np.ndarray) -> None:
    """Write `values` to the `target` region of the tensor of `shape` that begins at byte `offset`."""
    itemsize = values.dtype.itemsize
    values = values.reshape(extent(target)) if values.flags.c_contiguous else _gathered(values).reshape(extent(target))
    with meter("write", values.nbytes):
        for first, index, _ in runs(shape, target):
            _write_all(descriptor, memoryview(values[index].reshape(-1).view(np.uint8)), offset + first * itemsize)


def _gathered(values: np.ndarray) -> np.ndarray:
    """A strided part as contiguous bytes, in a buffer that this thread uses again for the next one."""
    with meter("shard", values.nbytes):
        buffer = getattr(_local, "buffer", None)
        if buffer is None or buffer.nbytes < values.nbytes:
            buffer = _local.buffer = np.empty(values.nbytes, dtype=np.uint8)
        result = buffer[: values.nbytes].view(values.dtype).reshape(values.shape)
        np.copyto(result, values)
        return result


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
