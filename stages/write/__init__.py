"""write: the work of a task. It reads source blocks a piece at a time and scatters each to its places in rank files or scratch.

The order in which blocks are written does not matter: read(write(x)) == x.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.tensor.blocks import Part, StageOfGroup, make_blocks
from pipeline.tensor.metering import collect, meter
from pipeline.tensor.placement import Region, extent, intersect, pieces, shift, size, slices, whole
from pipeline.tensor.process import memory_bytes
from pipeline.tensor.settling import settling
from pipeline.tensor.system_errors import naming
from pipeline.tensor.tensors import Block
from stages.write.deliveries import BlockWrite, Delivery
from stages.write.open_files import OPEN_FILES, OpenFiles
from stages.write.parts import PartBytes, RankPart, RankStream, UploadedPart, gathering

_local = threading.local()

# Bytes of one write call. Larger ones make the page cache allocate large runs of memory, which a virtual machine may first have to
# get from its host.
WRITE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Checksum:
    """The 64-bit xxh3 of `nbytes` bytes from `offset` of a rank's file, or of a chunk of scratch that it names.

    `sink`: the position of its sink among those written.
    """

    sink: int
    rank: int
    offset: int
    nbytes: int
    xxh3: str
    chunk: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a task.

    `number`: the task's number in the plan. `name`: the last tensor that it wrote. `metrics`: values by (stage, "bytes" or
    "seconds"). `paths`: the files that it wrote to. `parts`: what it uploaded. `ended`: when, in seconds since the epoch;
    `memory_bytes`: of its process then.
    """

    number: int
    name: str
    bytes_read: int
    bytes_written: int
    metrics: dict[tuple[str, str], float]
    paths: tuple[str, ...]
    checksums: tuple[Checksum, ...]
    parts: tuple[UploadedPart, ...] = ()
    ended: float = 0.0
    memory_bytes: int = -1

    @property
    def chunk_parts(self) -> Mapping[str, Sequence[Part]]:
        """The parts that it wrote of each chunk of scratch, by the chunk's name."""
        parts: dict[str, list[Part]] = {}
        for checksum in self.checksums:
            if checksum.chunk:
                parts.setdefault(checksum.chunk, []).append((checksum.offset, checksum.nbytes, checksum.xxh3))
        return parts


def write_group(
    number: int,
    work: Sequence[BlockWrite],
    opened: StageOfGroup,
    numbers: Sequence[Sequence[int]],
    *inputs: Any,
    synchronize: bool = False,
    pool: str = "",
    outputs: Sequence[str] = (),
    open_files: int = OPEN_FILES,
    part: RankPart | None = None,
    uploads: Mapping[str, str] | None = None,
) -> Written:
    """Write a group of blocks: the tasks `write` and `scratch` of a graph.

    `opened`: the blocks that are made here, as chunks of scratch are opened. `numbers[i]`: for each sink of `work[i]`, the number
    of its block. `inputs`: those of `make_blocks`. `pool`: a directory of files that new chunks of scratch may take. `outputs`: of
    each output that is made, the file that is there when it is whole: then nothing is written to it again; "" for those in object
    storage, whose uploads end then. `part`: of a rank's file that is assembled, with the ids of `uploads` by URL. The others are
    `write_blocks`' own.
    """
    there = [bool(mark) and Path(mark).exists() for mark in outputs]
    if there and all(there):
        return Written(number, work[-1].name, 0, 0, {}, (), ())
    if any(there) and not any(to.chunk for item in work for sink in item.deliveries for to in sink):
        kept = [tuple(() if done else to for done, to in zip(there, item.deliveries, strict=True)) for item in work]
        work = [replace(item, deliveries=to) for item, to in zip(work, kept, strict=True)]
    blocks = make_blocks(opened, *inputs)
    files = gathering(part, uploads or {}) if part else OpenFiles(pool, open_files)
    versions = [item.parts(blocks[n] for n in each) for item, each in zip(work, numbers, strict=True)]
    return write_blocks(number, work, versions, synchronize, files)


def write_blocks(
    number: int,
    work: Sequence[BlockWrite],
    blocks: Sequence[Sequence[Block]],
    synchronize: bool = False,
    files: OpenFiles | PartBytes | RankStream | None = None,
) -> Written:
    """Scatter source blocks to every rank of every target.

    Parameters
    ----------
    number
        The task's number in the plan.
    work
        What to do with each source block.
    blocks
        For each item of `work` and each of its sinks, the source block as the sink takes it, such as cast to the target's type.
    synchronize
        Flush the files to disk before returning, for workers whose files no other process can flush.
    files
        What the bytes go to: files, or what gathers a part of a rank's file.

    Returns
    -------
    Written
        Bytes, metrics, files and checksums.

    Raises
    ------
    OSError
        Reading or writing failed; it names the file.
    """
    written = 0
    checksums: list[Checksum] = []
    with collect() as metrics, files or OpenFiles() as to:
        with settling():
            for item, versions in zip(work, blocks, strict=True):
                hashes = [[xxhash.xxh3_64() for _ in sink] for sink in item.deliveries]
                for piece in _pieces(item, versions[0].shape):
                    # Sinks that take the same block share one reading of each piece.
                    values: dict[int, np.ndarray] = {}
                    for block, sink, digests in zip(versions, item.deliveries, hashes, strict=True):
                        written += _write_piece(block, piece, values, sink, digests, to)
                checksums += _checksums(item, versions, hashes)
        if synchronize and isinstance(to, OpenFiles):
            to.synchronize()
        parts = () if isinstance(to, OpenFiles) else (to.sent(),)
        paths = tuple(to.paths) if isinstance(to, OpenFiles) else ()
        read = int(metrics.get(("read", "bytes"), 0))
        name = work[-1].name if work else ""
        told = dict(metrics), paths, tuple(checksums), parts
        return Written(number, name, read, written, *told, time.time(), memory_bytes())


def _pieces(item: BlockWrite, shape: Sequence[int]) -> Iterable[Region]:
    """The pieces of a block; all of it where chunks are put whole, for which blocks are small."""
    if any(to.offset < 0 for sink in item.deliveries for to in sink):
        return [whole(shape)]
    return pieces(whole(shape), item.itemsize, item.piece_bytes, item.row_multiple)


def _checksums(item: BlockWrite, versions: Sequence[Block], hashes: Sequence[Sequence[xxhash.xxh3_64]]) -> list[Checksum]:
    return [
        Checksum(
            number,
            delivery.rank,
            max(delivery.offset, 0),
            size(delivery.source) * block.dtype.itemsize,
            digest.hexdigest(),
            delivery.chunk,
        )
        for number, (block, sink, digests) in enumerate(zip(versions, item.deliveries, hashes, strict=True))
        for delivery, digest in zip(sink, digests, strict=True)
    ]


def _write_piece(
    block: Block,
    piece: Region,
    read: dict[int, np.ndarray],
    sink: Sequence[Delivery],
    hashes: Sequence[xxhash.xxh3_64],
    files: OpenFiles | PartBytes | RankStream,
) -> int:
    """Write what a sink takes of a piece, and return the bytes written. `read`: values of this piece already read, by block."""
    written = 0
    for delivery, digest in zip(sink, hashes, strict=True):
        common = intersect(delivery.source, piece)
        if common is None:
            continue
        if id(block) not in read:
            read[id(block)] = block.read(piece)
        part = read[id(block)][slices(shift(common, [start for start, _ in piece], -1))]
        if delivery.offset < 0:
            if common != delivery.source:
                raise RuntimeError(f"{delivery.chunk}: a part of a chunk, which is put whole")
            _put(delivery, part, digest)
            written += part.nbytes
            continue
        data = (part if part.flags.c_contiguous else _gathered(part)).reshape(-1).view(np.uint8).data
        offset = delivery.offset + _first(common, delivery.source) * part.dtype.itemsize
        descriptor = files.descriptor(delivery) if isinstance(files, OpenFiles) else -1
        with meter("checksum", len(data)):
            digest.update(data)
        with meter("write_scratch" if delivery.chunk else "write", len(data)), naming(delivery.path):
            if isinstance(files, OpenFiles):
                _write_all(descriptor, data, offset)
            else:
                files.write(data, offset)
        written += len(data)
    return written


def _put(delivery: Delivery, values: np.ndarray, digest: xxhash.xxh3_64) -> None:
    """Store a piece, which is a whole chunk, in the Zarr array of a delivery without an offset."""
    import zarr

    array = zarr.open_array(delivery.path, mode="r+")
    values = np.ascontiguousarray(values)
    with meter("checksum", values.nbytes):
        digest.update(values.reshape(-1).view(np.uint8).data)
    with meter("write_scratch", values.nbytes):
        array[slices(delivery.target)] = values.reshape(extent(delivery.target)).view(array.dtype)


def _first(part: Region, region: Region) -> int:
    """Return the index of a part's first element in the C order of the region that contains it."""
    shape = extent(region)
    return sum((a - b) * math.prod(shape[axis + 1 :]) for axis, ((a, _), (b, _)) in enumerate(zip(part, region, strict=True)))


def _gathered(values: np.ndarray) -> np.ndarray:
    """Copy a strided part into a contiguous buffer, which this thread reuses for the next one."""
    with meter("shard", values.nbytes):
        buffer = getattr(_local, "buffer", None)
        if buffer is None or buffer.nbytes < values.nbytes:
            buffer = _local.buffer = np.empty(values.nbytes, dtype=np.uint8)
        result = buffer[: values.nbytes].view(values.dtype).reshape(values.shape)
        np.copyto(result, values)
        return result


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, in calls of WRITE_BYTES."""
    while data:
        count = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[count:], offset + count
