"""Scratch: Zarr arrays between two phases. A cut after a stage (see `--scratch_after`) changes no byte of the output.

Each cut is a Zarr group (format 3) of arrays named like their tensors, which plain `zarr.open` reads. Arrays are uncompressed;
bfloat16 and float8 are stored as unsigned integers of the same width, with the true dtype, the source and the shape in the
attributes. On a local disk, tasks write the chunk files in place and read them through memory maps, as going through zarr for
either is slow.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import BadInput
from pipeline.sinks import hold
from pipeline.sinks.chunk_sums import SUMS, chunk_parts, recorded_parts, sums_entry
from pipeline.sinks.journal import Journal, look
from pipeline.sinks.output import is_whole
from pipeline.sinks.reserve import missing, unmake
from pipeline.sinks.syncing import sync_names, sync_tree
from pipeline.sinks.zarr_files import has_metadata, read_attributes, write_array, write_group
from pipeline.tensor.blocks import Part
from pipeline.tensor.chunk_files import pooled_name
from pipeline.tensor.placement import Located, Region, contiguous, intersect, shift
from pipeline.tensor.remote_path import as_path
from pipeline.tensor.system_errors import refusal

JOURNAL = "headrace.journal"
POOL = ".free"
POOLED_BYTES = 1 << 20  # smaller files are as quickly made
POOL_FILES = 8
DEFAULT_ROOT = ".headrace-scratch"  # beside the outputs


@dataclass(frozen=True)
class ScratchArray:
    """A tensor stored as a Zarr array on a local disk, in chunks of `chunk_shape`; each chunk is a file of C-ordered bytes."""

    directory: Path
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype
    source: str

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.chunk_shape)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The size of all chunk files; a chunk at the edge is stored in full, as large as the others."""
        return self.chunk_bytes * len(list(self.chunks()))

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yield the index of every chunk."""
        counts = [-(-n // chunk) for n, chunk in zip(self.shape, self.chunk_shape, strict=True)]
        return itertools.product(*map(range, counts))

    def path(self, index: tuple[int, ...]) -> Path:
        """Return the file of the chunk at `index`, by Zarr's default key encoding."""
        return self.directory.joinpath("c", *map(str, index))

    def chunk_name(self, index: tuple[int, ...]) -> str:
        """The name of a chunk in the results of tasks: the path of its file."""
        return str(self.path(index))

    def locate(self, region: Region) -> Iterator[Located]:
        """Yield the contiguous runs of bytes that hold a region, chunk by chunk."""
        ranges = [range(start // chunk, -(-stop // chunk)) for (start, stop), chunk in zip(region, self.chunk_shape, strict=True)]
        for index in itertools.product(*ranges):
            origin = [i * chunk for i, chunk in zip(index, self.chunk_shape, strict=True)]
            bounds = shift(tuple((0, chunk) for chunk in self.chunk_shape), origin)
            common = intersect(region, bounds)
            if common is None:
                continue
            for first, part in contiguous(self.chunk_shape, shift(common, origin, -1)):
                path = str(self.path(index))
                yield Located(path, first * self.dtype.itemsize, shift(part, origin), path, self.chunk_bytes)


def remove_empty_root(root: Path) -> None:
    """Remove the directory that scratch has by default, once nothing is in it."""
    if root.name == DEFAULT_ROOT:
        with contextlib.suppress(OSError):  # cuts or journals are in it
            root.rmdir()


def take_away(directory: Path) -> None:
    """Remove a cut, or a calibration's scratch, and the root that it leaves empty.

    It stays where another job is at work on it, or it cannot be written.
    """
    with contextlib.suppress(BadInput, OSError):
        with contextlib.closing(Journal(directory / JOURNAL)):
            shutil.rmtree(directory, ignore_errors=True)
        directory.rmdir()  # where a file system kept what was open
    remove_empty_root(directory.parent)


@dataclass(frozen=True)
class ScratchGroup:
    """One cut on a local disk: its arrays by (rank, tensor), with rank 0 for all before the split.

    `id` names the contents: cuts with equal ids hold equal bytes. `keep`: leave it in place after use. `outputs`: the directories
    that are written from it, by several jobs; one that is kept for these alone goes when all of them are whole.
    """

    directory: Path
    stage: str
    id: str
    source: str
    keep: bool
    arrays: Mapping[tuple[int, str], ScratchArray] = field(repr=False)
    bound_bytes: int = 0
    outputs: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def place(self) -> str:
        """The cut's location as messages show it."""
        return str(self.directory)

    @property
    def local_bytes(self) -> int:
        """The most space that it needs on a local disk: of a cut that is not kept, chunks are freed while others are written."""
        return self.size_bytes if self.keep else min(self.bound_bytes, self.size_bytes)

    @property
    def complete(self) -> bool:
        """Whether an earlier run finished the cut with this id."""
        attributes = read_attributes(self.directory)
        return attributes.get("id") == self.id and bool(attributes.get("complete"))

    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]:
        """Yield where the bytes of a region of a tensor lie."""
        return self.arrays[rank, tensor].locate(region)

    def begin(self, tasks: str, fresh: bool = False) -> Journal:
        """Create the group, or take up what an earlier run left of it. Chunks' files are made by the tasks that write them.

        The journal's entries say the checksums of the chunks that an earlier run wrote; whether these are there, `has` says.
        Raises BadInput where another job is at work on it, or it cannot be written.
        """
        created = missing(self.directory)
        owner = {"headrace": "scratch", "id": self.id, "tasks": tasks}
        journal = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.directory / JOURNAL)
            if not fresh and journal.owner == owner:
                if not self._described():
                    self._create()
                self.join()
                return journal
            recorded = {} if fresh else self.recorded()
            if recorded:
                self._update(complete=False)
                self.join()
            else:
                for path in self.directory.iterdir():
                    if path.name not in (JOURNAL, JOURNAL + hold.SUFFIX):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                self._create()
            journal.start(owner)
            if recorded:
                journal.append(sums_entry(recorded))
            return journal
        except OSError as error:
            if journal:
                self.abandon(journal, created)
            else:
                unmake(self.directory, created)
            raise refusal(error, self.directory, "a directory that can be written", "choose another --scratch") from None

    def begun(self, tasks: str) -> list[dict[str, Any]]:
        """The journal's entries of what `begin` would take up; nothing changes."""
        with contextlib.suppress(OSError):
            owner, entries = look(self.directory / JOURNAL)
            if owner == {"headrace": "scratch", "id": self.id, "tasks": tasks}:
                return entries
        return [sums_entry(recorded)] if (recorded := self.recorded()) else []

    def recorded(self) -> dict[str, list[Part]]:
        """The parts of the chunks of a finished cut, by chunk; nothing where no earlier run finished it."""
        attributes = read_attributes(self.directory)
        if attributes.get("id") != self.id or not attributes.get("complete"):
            return {}
        return {str(self.directory / name): parts for name, parts in recorded_parts(attributes).items()}

    def vouched(self, entries: Iterable[Mapping[str, Any]]) -> set[str]:
        """The files of which a journal's entries say that bytes of them are written."""
        return {str(chunk) for entry in entries for chunk, *_ in entry["sums"]}

    def has(self, chunk: str, parts: Sequence[Part]) -> bool:
        """Whether a chunk is there, of which `parts` are known. Whether its bytes are those is seen when it is read."""
        try:
            return bool(parts) and Path(chunk).stat().st_size >= max(offset + nbytes for offset, nbytes, _ in parts)
        except OSError:
            return False

    @property
    def kept(self) -> bool:
        """Whether it stays: this job asked for it, or the one that made it."""
        return self.keep or bool(read_attributes(self.directory).get("keep"))

    def join(self) -> None:
        """Add this job's outputs to those that the cut is kept for."""
        said = read_attributes(self.directory).get("outputs", [])
        if more := [output for output in self.outputs if output not in said]:
            self._update(outputs=[*said, *more])

    @property
    def of_ranks(self) -> bool:
        """Whether it holds rank tensors, padding included: a cut after `shard`."""
        return self.stage.startswith("shard")

    @property
    def pool(self) -> Path:
        """Where the files of freed chunks wait to be written again: over memory that the system still holds for them."""
        return self.directory / POOL

    def free(self, chunk: str, pooled: bool = True) -> None:
        """Give up a chunk that nothing reads any more: its file goes to the pool, or, where that is full or not used, away."""
        path = Path(chunk)
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            if pooled:
                self.pool.mkdir(exist_ok=True)
            if not pooled or self.of_ranks or size < POOLED_BYTES or len(os.listdir(self.pool)) >= POOL_FILES:  # noqa: PTH208 (names alone)
                path.unlink()
            else:
                path.rename(self.pool / pooled_name(size))

    def finish(self, journal: Journal) -> None:
        """Mark the cut as complete, and so as reusable, with the checksums of its chunks.

        All of it is on the disk before it says so, whoever wrote it. Raises OSError where the disk fails.
        """
        sync_tree(self.directory)
        sums = {str(Path(chunk).relative_to(self.directory)): parts for chunk, parts in chunk_parts(journal.entries).items()}
        self._update(sync=True, **{SUMS: sums, "complete": True})
        sync_names(self.directory)
        journal.remove()

    def forget_journal(self) -> None:
        """Remove the journal that a run left which ended after it had called the cut complete; not that of a run under way."""
        path = self.directory / JOURNAL
        with contextlib.suppress(BadInput, OSError):
            if path.exists():
                Journal(path).remove()
            else:
                hold.forget(path)

    def abandon(self, journal: Journal, created: Path | None) -> None:
        """Remove everything that `begin` made. `created`: the topmost directory that it made, or None."""
        journal.remove()
        unmake(self.directory, created or self.directory)

    def release(self) -> None:
        """Remove the cut after use.

        It stays where this job or the one that made it wants it kept, an output of it is not whole yet, or a job is at work on it.
        """
        if not self.kept or served(read_attributes(self.directory)):
            take_away(self.directory)

    def _create(self) -> None:
        attributes: dict[str, Any] = {"headrace": "scratch", "stage": self.stage, "id": self.id, "source": self.source}
        marks = {"complete": False, "keep": self.keep, "outputs": list(self.outputs)}
        write_group(self.directory, {**attributes, **marks})
        for place in {array.directory.parent for array in self.arrays.values()} - {self.directory}:  # of a rank
            write_group(place, {})
        for array in self.arrays.values():
            write_array(array.directory, array.shape, array.chunk_shape, array.dtype, array.source)

    def _described(self) -> bool:
        """Whether all metadata is there; a power cut may have taken some, though the journal was on the disk."""
        arrays = (array.directory for array in self.arrays.values())
        return read_attributes(self.directory).get("id") == self.id and all(map(has_metadata, arrays))

    def _update(self, sync: bool = False, **values: Any) -> None:
        write_group(self.directory, {**read_attributes(self.directory), **values}, sync)


def served(attributes: Mapping[str, Any]) -> bool:
    """Whether a cut is kept for some outputs alone, and all of them are whole."""
    outputs = attributes.get("outputs")
    return isinstance(outputs, list) and bool(outputs) and all(is_whole(as_path(str(output))) for output in outputs)


def scratch_id(*parts: Any) -> str:
    """Return 16 hex digits that name a cut's contents: a hash of everything that its bytes depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
