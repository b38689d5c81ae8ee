"""Scratch: Zarr arrays between two phases. A cut can stand after any stage and changes no byte of the output.

Each cut is a Zarr group (format 3) of arrays named like their tensors, readable with plain `zarr.open`: uncompressed, bfloat16 and
float8 as the unsigned integers of the same width, with the true dtype, the source and the shape in the attributes. On a local disk
tasks write the chunk files in place and map them to read them back: both the slow halves of going through Zarr.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import of_numpy
from pipeline.sinks.journal import Journal
from pipeline.sinks.reserve import missing, reserve
from pipeline.tensor.placement import Located, Region, contiguous, intersect, shift

STAGES = ("read", "rename", "unpack", "shard")
JOURNAL = "headrace.journal"
DEFAULT_ROOT = ".headrace-scratch"  # beside the outputs


@dataclass(frozen=True)
class ScratchArray:
    """A tensor as a Zarr array on a local disk: chunks of `chunk_shape`, each one file of C-ordered bytes."""

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
        """The size of the chunk files; those at the edge are as large as the others."""
        return self.chunk_bytes * len(list(self.chunks()))

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """The index of every chunk."""
        counts = [-(-n // chunk) for n, chunk in zip(self.shape, self.chunk_shape, strict=True)]
        return itertools.product(*map(range, counts))

    def path(self, index: tuple[int, ...]) -> Path:
        """The file of a chunk, by Zarr's default key encoding."""
        return self.directory.joinpath("c", *map(str, index))

    def locate(self, region: Region) -> Iterator[Located]:
        """The contiguous runs of bytes, chunk by chunk, that hold a region."""
        ranges = [range(start // chunk, -(-stop // chunk)) for (start, stop), chunk in zip(region, self.chunk_shape, strict=True)]
        for index in itertools.product(*ranges):
            origin = [i * chunk for i, chunk in zip(index, self.chunk_shape, strict=True)]
            bounds = shift(tuple((0, chunk) for chunk in self.chunk_shape), origin)
            common = intersect(region, bounds)
            if common is None:
                continue
            for first, part in contiguous(self.chunk_shape, shift(common, origin, -1)):
                yield Located(str(self.path(index)), first * self.dtype.itemsize, shift(part, origin))


@dataclass(frozen=True)
class ScratchGroup:
    """One cut: its arrays by (rank, tensor), rank 0 before the split. `id` names what is in it; equal ids hold equal bytes."""

    directory: Path
    stage: str
    id: str
    source: str
    keep: bool
    arrays: Mapping[tuple[int, str], ScratchArray] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def place(self) -> str:
        """Where the cut is, for people."""
        return str(self.directory)

    @property
    def local_bytes(self) -> int:
        """What it needs of a local disk."""
        return self.size_bytes

    @property
    def complete(self) -> bool:
        """Whether an earlier run left the cut whole."""
        attributes = _attributes(self.directory)
        return attributes.get("id") == self.id and bool(attributes.get("complete"))

    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]:
        """The bytes of a region of a tensor."""
        return self.arrays[rank, tensor].locate(region)

    def begin(self, tasks: int, fresh: bool) -> Journal:
        """Make the group and reserve every chunk, or take up what an interrupted run left.

        Raises BadInput where another job holds it, it cannot be written, or there is no room.
        """
        created = missing(self.directory)
        owner = {"headrace": "scratch", "id": self.id, "tasks": tasks}
        journal = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.directory / JOURNAL)
            if not fresh and journal.owner == owner:
                return journal
            for path in self.directory.iterdir():
                if path.name != JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._create()
            journal.start(owner)
            return journal
        except OSError as error:
            if journal:
                self.abandon(journal, created)
            expected = f"room for {self.size_bytes:,} bytes in a directory that can be written"
            remedy = "Free space, or choose another --scratch"
            subject, found = str(error.filename or self.directory), error.strerror or "an error"
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise BadInput([Problem(subject, found, expected, remedy, passing=full)]) from None

    def finish(self, journal: Journal, *_: object) -> None:
        """Say that the cut is whole, and reusable."""
        import zarr

        zarr.open_group(self.directory, mode="r+").attrs["complete"] = True
        journal.remove()

    def abandon(self, journal: Journal, created: Path | None) -> None:
        """Remove what `begin` made: `created` is the topmost directory that it made."""
        journal.remove()
        shutil.rmtree(created or self.directory, ignore_errors=True)

    def release(self) -> None:
        """Remove the cut after use, unless this job or the one that made it keeps it."""
        if not (self.keep or _attributes(self.directory).get("keep")):
            shutil.rmtree(self.directory, ignore_errors=True)
            if self.directory.parent.name == DEFAULT_ROOT:
                with contextlib.suppress(OSError):  # other cuts are in it
                    self.directory.parent.rmdir()

    def _create(self) -> None:
        import zarr

        attributes: dict[str, Any] = {"headrace": "scratch", "stage": self.stage, "id": self.id, "source": self.source}
        attributes |= {"complete": False, "keep": self.keep}
        group = zarr.create_group(self.directory, zarr_format=3, attributes=attributes)
        for array in self.arrays.values():
            add_array(group, str(array.directory.relative_to(self.directory)), array)
            for index in array.chunks():
                path = array.path(index)
                path.parent.mkdir(parents=True, exist_ok=True)
                reserve(path, array.chunk_bytes)


def add_array(group: Any, name: str, array: Any) -> None:
    """Add a tensor to a Zarr group: uncompressed, every chunk stored, as bit patterns whose meaning the attributes say."""
    row = of_numpy(array.dtype)
    group.create_array(
        name,
        shape=array.shape,
        chunks=array.chunk_shape,
        dtype=row.zarr,
        compressors=None,
        fill_value=0,
        config={"write_empty_chunks": True},
        attributes={"dtype": row.safetensors, "source": array.source, "shape": list(array.shape)},
    )


def scratch_id(*parts: Any) -> str:
    """A short name for what a cut holds: a hash of everything that its bytes depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """A cut on disk, as `headrace scratch ls` shows it."""

    directory: Path
    stage: str
    source: str
    complete: bool
    size_bytes: int


def list_scratch(root: Path) -> list[Found]:
    """The cuts in a scratch directory."""
    found = []
    for directory in sorted(root.glob("*.zarr")):
        attributes = _attributes(directory)
        if attributes.get("headrace") == "scratch":
            nbytes = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
            found.append(Found(directory, attributes["stage"], attributes["source"], attributes["complete"], nbytes))
    return found


def remove_scratch(root: Path, names: list[str]) -> list[Found]:
    """Remove cuts by the names of their directories, or all; one that a job is at work on is refused with BadInput."""
    found = [cut for cut in list_scratch(root) if not names or cut.directory.name in names]
    missing = sorted(set(names) - {cut.directory.name for cut in found})
    if missing:
        raise BadInput([Problem(str(root / name), "no such cut", "one that `headrace scratch ls` lists") for name in missing])
    journals = [Journal(cut.directory / JOURNAL) for cut in found]
    for cut, journal in zip(found, journals, strict=True):
        shutil.rmtree(cut.directory)
        journal.close()
    return found


def _attributes(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / "zarr.json").read_text()).get("attributes", {}))
    except (OSError, ValueError):
        return {}
