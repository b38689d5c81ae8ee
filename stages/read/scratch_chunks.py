"""Read chunks of scratch back. A chunk is used only if its bytes are those that were written, by the checksums taken meanwhile."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline.tensor.arrays import BlockArray, Index, Maker, Needed, SmallTask, grid
from pipeline.tensor.blocks import CHECKSUMS, Part
from pipeline.tensor.mapping import file_bytes
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, slices, whole
from pipeline.tensor.settling import settle
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
    """A chunk of scratch whose checksums are looked at while it is read: its bytes are summed in order, as far as they are read.

    The rest is summed at the end of the task (`pipeline.tensor.settling`), or at once where no task runs.
    """

    def __init__(self, chunk: ScratchChunk, parts: Sequence[Part]) -> None:
        self.chunk, self.parts = chunk, parts
        self.block = chunk.tensor.block(chunk.region)
        self.shape, self.dtype = self.block.shape, self.block.dtype
        self._checked = False
        self._sums: PartSums | None = None

    def read(self, region: Region) -> np.ndarray:
        """Return the values of `region`. Raises OSError where the chunk is not there, or its bytes are not those written.

        The latter may show only when the task ends. A damaged chunk is removed, so that the next run makes it anew.
        """
        if not self.size:
            return np.empty(extent(region), dtype=self.dtype)
        if self.chunk.remote:
            return self._fetch(region)
        if self._checked:
            return self.block.read(region)
        if self._sums is None:
            self._sums = self._begin()
            if not settle(self._settle):
                self._settle()
        values = self.block.read(region)
        if not self._checked:
            start, stop = _span(region, self.chunk.tensor.shape, self.dtype.itemsize)
            self._advance(self._sums, stop, values if values.nbytes == stop - start and values.flags.c_contiguous else None)
        return values

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

    def _begin(self) -> PartSums:
        if not self.parts:
            raise OSError(errno.EIO, "a chunk of scratch of which nobody has said that it was written", self.chunk.name)
        if Path(self.chunk.name).stat().st_size < self.parts[-1][0] + self.parts[-1][1]:
            raise self._removed()
        return PartSums(self.chunk.name, self.parts)

    def _advance(self, sums: PartSums, stop: int, values: np.ndarray | None = None) -> None:
        if not sums.advance(stop, None if values is None else values.reshape(-1).view(np.uint8).data):
            raise self._removed()
        self._checked = sums.ended

    def _settle(self) -> None:
        """Sum the rest."""
        if self._sums is not None and not self._checked:
            self._advance(self._sums, self.parts[-1][0] + self.parts[-1][1])

    def _removed(self) -> OSError:
        with suppress(OSError):
            Path(self.chunk.name).unlink()
        return self._damaged()

    def _damaged(self) -> OSError:
        return OSError(errno.EIO, "a chunk of scratch whose bytes are not those that were written", self.chunk.name)


class PartSums:
    """The checksums of the parts of a file, which are summed in order and compared as each has come to its end."""

    def __init__(self, path: str, parts: Sequence[Part]) -> None:
        """`parts`: in order, and at least one."""
        self.path, self.parts = path, list(parts)
        self._at, self._digest = self.parts[0][0], xxhash.xxh3_64()

    @property
    def ended(self) -> bool:
        """Whether all parts have been compared."""
        return not self.parts

    def advance(self, stop: int, data: memoryview | None = None) -> bool:
        """Sum the bytes up to `stop`; returns whether the parts that have come to their end are as they were written.

        `data`: the last bytes before `stop`, where they are at hand; others are mapped.
        """
        start = stop if data is None else stop - len(data)
        while self.parts and self._at < stop:
            offset, nbytes, expected = self.parts[0]
            end = min(offset + nbytes, stop)
            with meter("checksum", max(end - self._at, 0)):
                if self._at < start:
                    self._map(min(start, end))
                if data is not None and self._at < end:
                    self._digest.update(data[self._at - start : end - start])
                    self._at = end
            if self._at < offset + nbytes:
                break
            if self._digest.hexdigest() != expected:
                return False
            del self.parts[0]
            self._digest.reset()
            self._at = self.parts[0][0] if self.parts else self._at
        return True

    def _map(self, stop: int) -> None:
        """Sum the bytes up to `stop`, mapped a few MiB at a time."""
        with Path(self.path).open("rb") as file:
            while self._at < stop:
                count = min(HASHED_BYTES, stop - self._at)
                self._digest.update(file_bytes(file.fileno(), self.path, self._at, self._at + count).data)
                self._at += count


def _span(region: Region, shape: Sequence[int], itemsize: int) -> tuple[int, int]:
    """The bytes from the first element of a region to its last, in an array of this shape in C order; none of an empty region."""
    if any(stop <= start for start, stop in region):
        return 0, 0
    steps = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    first = sum(start * step for (start, _), step in zip(region, steps, strict=True))
    return first, sum((stop - 1) * step for (_, stop), step in zip(region, steps, strict=True)) + itemsize


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
