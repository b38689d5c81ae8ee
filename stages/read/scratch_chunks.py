"""Read chunks of scratch back. A chunk is used only if its bytes are those that were written, by the checksums taken meanwhile."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline.tensor.arrays import BlockArray, Index, Maker, Needed, SmallTask, grid
from pipeline.tensor.blocks import CHECKSUMS, Part
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, slices, whole
from pipeline.tensor.tensors import Block, LazyTensor
from stages.read.mapped import MappedTensor
from stages.read.zarr_store import StoreTensor

READ_SCRATCH = "read_scratch"  # the stage that reading chunks back is metered as
HASHED_BYTES = 4 << 20  # mapped and summed at a time


@dataclass(frozen=True)
class ScratchChunk:
    """One chunk of a cut.

    `name`: as the task that wrote it says, the path of its file or a URL. `tensor` and `region`: where its values are read from.
    `remote`: it is fetched from a bucket, as a whole.
    """

    name: str
    tensor: LazyTensor
    region: Region
    remote: bool = False


class OpenChunk(NamedTuple):
    """Opens a chunk, as a small task does; nothing is read yet."""

    chunk: ScratchChunk

    @property
    def stage(self) -> str:
        """Chunks are opened by the first stage that needs them."""
        return "scratch"

    def __call__(self, parts: Mapping[str, Sequence[Part]]) -> Block:
        """`parts`: those of each chunk, by its name."""
        return CheckedBlock(self.chunk, sorted(parts.get(self.chunk.name, ())))


class CutArray(BlockArray):
    """A tensor of a cut, a chunk a chunk. `stored`: its Zarr array (pipeline/sinks/scratch.py, remote.py)."""

    __slots__ = ("stored",)

    def __init__(self, name: str, stored: Any) -> None:
        lengths = zip(stored.chunk_shape, stored.shape, strict=True)
        chunks = tuple(tuple(min(chunk, size - start) for start in range(0, size, chunk)) for chunk, size in lengths)
        super().__init__(grid(chunks), stored.dtype)
        self._name, self.stored = name, stored

    def naming(self) -> str:
        return self._name

    def make(self, index: Index) -> Maker:
        return OpenChunk(_chunk(self.stored, index, self.grid.regions[index]))

    def collect(self, index: Index, needed: Needed) -> int:
        """A chunk's checksums are needed, beside no block."""
        block = (self, index)
        if block not in needed:
            needed[block] = SmallTask(len(needed), self.make(index), (CHECKSUMS,)), self.stage
        return needed[block][0].number


class CheckedBlock(Block):
    """A chunk of scratch whose checksums are looked at when it is first read."""

    def __init__(self, chunk: ScratchChunk, parts: Sequence[Part]) -> None:
        self.chunk, self.parts = chunk, parts
        self.block = chunk.tensor.block(chunk.region)
        self.shape, self.dtype = self.block.shape, self.block.dtype
        self._checked = False

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`. Raises OSError where the chunk is not there, or its bytes are not those written.

        A damaged chunk is removed, so that the next run makes it anew.
        """
        if not self.size:
            return np.empty(extent(region), dtype=self.dtype)
        if self.chunk.remote:
            return self._fetch(region)
        if not self._checked:
            self._check_file(Path(self.chunk.name))
            self._checked = True
        return self.block.read(region)

    def _fetch(self, region: Region) -> np.ndarray:
        values = self.block.read(whole(self.shape))
        if self._checked:
            return values[slices(region)]
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with meter("checksum", data.nbytes):
            if [(0, data.nbytes, xxhash.xxh3_64_hexdigest(data.data))] != [tuple(part) for part in self.parts]:
                raise self._damaged()
        self._checked = True
        return values[slices(region)]

    def _check_file(self, path: Path) -> None:
        if not self.parts:
            raise OSError(errno.EIO, "a chunk of scratch of which nobody has said that it was written", self.chunk.name)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for offset, nbytes, digest in self.parts:
                if offset + nbytes > size or _digest(file.fileno(), offset, nbytes) != digest:
                    with suppress(OSError):
                        path.unlink()
                    raise self._damaged()

    def _damaged(self) -> OSError:
        return OSError(errno.EIO, "a chunk of scratch whose bytes are not those that were written", self.chunk.name)


def _digest(descriptor: int, offset: int, nbytes: int) -> str:
    """The xxh3 of a part of a file, which is mapped a few MiB at a time."""
    digest = xxhash.xxh3_64()
    with meter("checksum", nbytes):
        for start in range(offset, offset + nbytes, HASHED_BYTES):
            count = min(HASHED_BYTES, offset + nbytes - start)
            aligned = start - start % mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(descriptor, start - aligned + count, access=mmap.ACCESS_READ, offset=aligned) as pages:
                view = memoryview(pages)[start - aligned :]
                digest.update(view)
                view.release()
    return digest.hexdigest()


def read_scratch(stage: str, arrays: Mapping[str, Any]) -> dict[str, BlockArray]:
    """Return the tensors of a cut as arrays, a chunk a chunk: files are mapped, chunks in a bucket fetched through zarr.

    `arrays`: the cut's Zarr arrays by name (pipeline/sinks/scratch.py, remote.py).
    """
    return {name: CutArray(f"scratch-{stage}-{name}", stored) for name, stored in arrays.items()}


def _chunk(array: Any, index: tuple[int, ...], region: Region) -> ScratchChunk:
    """The chunk at an index, whose values are `region` of the tensor; one at the edge is stored whole and holds fewer rows."""
    name = array.chunk_name(index)
    if hasattr(array, "url"):
        return ScratchChunk(name, StoreTensor(array.url, array.shape, array.dtype, READ_SCRATCH), region, remote=True)
    return ScratchChunk(name, MappedTensor(name, 0, array.chunk_shape, array.dtype, READ_SCRATCH), whole(extent(region)))
