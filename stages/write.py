"""write: read(write(x)) == x, whatever the order of the blocks.

What a task runs: it reads a source block a piece at a time and scatters it to the places that a plan bound it to.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.tensor.metering import collect, meter
from pipeline.tensor.placement import Located, Placement, Region, extent, intersect, pieces, shift, size, slices, whole
from pipeline.tensor.tensors import Block

_local = threading.local()

# At once. Greater writes take the page cache's memory in great runs, which a virtual machine may first have to fetch from its host.
WRITE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Delivery:
    """The values of the `source` region of a block, in C order, go to the bytes from `offset` of the file at `path`.

    `rank` is the output rank that the file belongs to, or -1 for scratch, which is not checksummed. Where `offset` is -1, `path` is
    the URL of a Zarr array, whose region is the block's moved by `origin`.
    """

    path: str
    offset: int
    source: Region
    rank: int
    origin: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """What a task does with one source block: one list of deliveries for each sink, and how it is cut into pieces.

    `itemsize` is that of the widest form that a value takes on its way.
    """

    name: str
    deliveries: tuple[tuple[Delivery, ...], ...]
    itemsize: int
    piece_bytes: int
    row_multiple: int


@dataclass(frozen=True, slots=True)
class Checksum:
    """xxh3 (64 bits) of `nbytes` bytes from `offset` of a rank's file; `sink` is its place among those that are written."""

    sink: int
    rank: int
    offset: int
    nbytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Written:
    """What a task did: its number in the plan, the last tensor that it wrote, bytes and seconds by stage, files, checksums."""

    number: int
    name: str
    bytes_read: int
    bytes_written: int
    metrics: dict[tuple[str, str], float]
    paths: tuple[str, ...]
    checksums: tuple[Checksum, ...]


Locate = Callable[[int, str, Region], Iterable[Located]]


def deliveries(placements: Sequence[Placement], region: Region, locate: Locate, checksummed: bool) -> tuple[Delivery, ...]:
    """The deliveries of the block at `region` of a source; `locate` finds the bytes of a region of a rank's tensor.

    Padding needs none: reserved bytes are zeros.
    """
    result = []
    for placement in placements:
        common = intersect(placement.source, region) if placement.source is not None else None
        if common is None or placement.source is None:
            continue
        lead = len(placement.target) - len(common)
        move = [t[0] - s[0] for t, s in zip(placement.target[lead:], placement.source, strict=True)]
        target = (*placement.target[:lead], *shift(common, move))
        origin = [start for start, _ in region]
        for place in locate(placement.rank, placement.tensor, target):
            source = shift(shift(place.region[lead:], move, -1), origin, -1)
            result.append(Delivery(place.path, place.offset, source, placement.rank if checksummed else -1, tuple(origin)))
    return tuple(result)


def write_blocks(number: int, work: Sequence[BlockWrite], blocks: Sequence[Sequence[Block]], synchronize: bool = False) -> Written:
    """Scatter source blocks to every rank of every target.

    `blocks[i]` are the values of `work[i]` as each sink wants them (the same source block, cast to each target's type).
    `synchronize` has the bytes on disk before the task ends, where no other process can see to that. Raises OSError where reading
    or writing fails.
    """
    written = 0
    checksums: list[Checksum] = []
    with collect() as metrics, ExitStack() as stack:
        files: dict[str, int] = {}
        for item, versions in zip(work, blocks, strict=True):
            hashes = [[xxhash.xxh3_64() if delivery.rank >= 0 else None for delivery in sink] for sink in item.deliveries]
            for piece in pieces(whole(versions[0].shape), item.itemsize, item.piece_bytes, item.row_multiple):
                # Targets that want the same values share one reading of them.
                values: dict[int, np.ndarray] = {}
                for block, sink, digests in zip(versions, item.deliveries, hashes, strict=True):
                    written += _write_piece(block, piece, values, sink, digests, files, stack)
            checksums += _checksums(item, versions, hashes)
        if synchronize:
            for descriptor in files.values():
                os.fdatasync(descriptor)
        read = int(metrics.get(("read", "bytes"), 0))
        return Written(number, work[-1].name, read, written, dict(metrics), tuple(files), tuple(checksums))


def _checksums(item: BlockWrite, versions: Sequence[Block], hashes: Sequence[Sequence[xxhash.xxh3_64 | None]]) -> list[Checksum]:
    return [
        Checksum(number, delivery.rank, delivery.offset, size(delivery.source) * block.dtype.itemsize, digest.hexdigest())
        for number, (block, sink, digests) in enumerate(zip(versions, item.deliveries, hashes, strict=True))
        for delivery, digest in zip(sink, digests, strict=True)
        if digest is not None
    ]


def _write_piece(
    block: Block,
    piece: Region,
    read: dict[int, np.ndarray],
    sink: Sequence[Delivery],
    hashes: Sequence[xxhash.xxh3_64 | None],
    files: dict[str, int],
    stack: ExitStack,
) -> int:
    written = 0
    for delivery, digest in zip(sink, hashes, strict=True):
        common = intersect(delivery.source, piece)
        if common is None:
            continue
        if id(block) not in read:
            read[id(block)] = block.read(piece)
        part = read[id(block)][slices(shift(common, [start for start, _ in piece], -1))]
        if delivery.offset < 0:
            _put(delivery, common, part)
            written += part.nbytes
            continue
        data = (part if part.flags.c_contiguous else _gathered(part)).reshape(-1).view(np.uint8).data
        if delivery.path not in files:
            files[delivery.path] = os.open(delivery.path, os.O_WRONLY)
            stack.callback(os.close, files[delivery.path])
        if digest is not None:
            with meter("checksum", len(data)):
                digest.update(data)
        with meter("write", len(data)):
            _write_all(files[delivery.path], data, delivery.offset + _first(common, delivery.source) * part.dtype.itemsize)
        written += len(data)
    return written


def _put(delivery: Delivery, common: Region, values: np.ndarray) -> None:
    """Store a piece, which is a chunk, in the Zarr array that a delivery without an offset names."""
    import zarr

    array = zarr.open_array(delivery.path, mode="r+")
    with meter("write", values.nbytes):
        array[slices(shift(common, delivery.origin))] = np.ascontiguousarray(values).view(array.dtype)


def _first(part: Region, region: Region) -> int:
    """The position of a part's first element in the C order of the region that it is a part of."""
    shape = extent(region)
    return sum((a - b) * math.prod(shape[axis + 1 :]) for axis, ((a, _), (b, _)) in enumerate(zip(part, region, strict=True)))


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
        count = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[count:], offset + count
