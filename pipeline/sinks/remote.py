"""Scratch on object storage: a cut as a Zarr group behind an fsspec URL. Each chunk is written and fetched as a whole."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.documents import MAX_BYTES, parse_json
from pipeline.errors import BadInput, Problem
from pipeline.model.dtypes import of_numpy
from pipeline.sinks.chunk_sums import SUMS, chunk_parts, recorded_parts, sums_entry
from pipeline.sinks.journal import Journal, look
from pipeline.sinks.scratch import served
from pipeline.sinks.zarr_files import METADATA, array_attributes
from pipeline.tensor.blocks import Part
from pipeline.tensor.placement import Located, Region


@dataclass(frozen=True)
class RemoteArray:
    """A tensor stored as a Zarr array at `url`, in chunks of `chunk_shape`; `dtype` is the tensor's, not the bit patterns'."""

    url: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype
    source: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def chunk_name(self, index: tuple[int, ...]) -> str:
        """The name of a chunk in the results of tasks: its URL, by Zarr's default key encoding."""
        return "/".join([self.url, "c", *map(str, index)])


@dataclass(frozen=True)
class RemoteGroup:
    """One cut at `url`. Its journal is a local file, so that only jobs of one machine are kept from writing it at the same time."""

    url: str
    stage: str
    id: str
    source: str
    keep: bool
    arrays: Mapping[tuple[int, str], RemoteArray] = field(repr=False)
    outputs: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """The directory of the journal, on this machine."""
        return Path(tempfile.gettempdir())

    @property
    def place(self) -> str:
        """The cut's location as messages show it."""
        return self.url

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def local_bytes(self) -> int:
        """The space that it needs on a local disk: none."""
        return 0

    @property
    def complete(self) -> bool:
        """Whether an earlier run finished the cut with this id."""
        attributes = self._attributes()
        return attributes.get("id") == self.id and bool(attributes.get("complete"))

    def locate(self, rank: int, tensor: str, region: Region) -> Iterator[Located]:
        """Yield the chunks of a region, which are whole, at the array's URL and with offset -1: zarr addresses them by region."""
        array = self.arrays[rank, tensor]
        ranges = [range(start, stop, chunk) for (start, stop), chunk in zip(region, array.chunk_shape, strict=True)]
        for corner in itertools.product(*ranges):
            index = tuple(start // chunk for start, chunk in zip(corner, array.chunk_shape, strict=True))
            axes = zip(corner, array.chunk_shape, region, strict=True)
            part = tuple((start, min(start + chunk, stop)) for start, chunk, (_, stop) in axes)
            yield Located(array.url, -1, part, array.chunk_name(index))

    def begin(self, tasks: str, fresh: bool = False) -> Journal:
        """Create the group and its arrays, or take up what an earlier run left of it.

        Raises BadInput where another job of this machine is at work on it, or the store cannot be written.
        """
        import zarr

        journal = Journal(self._journal)
        owner = {"headrace": "scratch", "id": self.id, "tasks": tasks}
        if not fresh and journal.owner == owner and self._attributes().get("id") == self.id:
            self.join()
            return journal
        recorded = {} if fresh else self.recorded()
        try:
            if recorded:
                _update_attributes(self.url, {"complete": False})
                self.join()
            else:
                attributes = {"headrace": "scratch", "stage": self.stage, "id": self.id, "source": self.source}
                marks = {"complete": False, "keep": self.keep, "outputs": list(self.outputs)}
                group = zarr.create_group(self.url, zarr_format=3, overwrite=True, attributes={**attributes, **marks})
                for array in self.arrays.values():
                    _add_array(group, array.url.removeprefix(f"{self.url}/"), array)
        except (OSError, ValueError, ImportError) as error:
            journal.remove()
            raise BadInput([Problem(f"--scratch {self.url}", str(error), "a store that can be written")]) from None
        journal.start(owner)
        if recorded:
            journal.append(sums_entry(recorded))
        return journal

    def begun(self, tasks: str) -> list[dict[str, Any]]:
        """The journal's entries of what `begin` would take up; nothing changes."""
        with suppress(OSError):
            owner, entries = look(self._journal)
            if owner == {"headrace": "scratch", "id": self.id, "tasks": tasks} and self._attributes().get("id") == self.id:
                return entries
        return [sums_entry(recorded)] if (recorded := self.recorded()) else []

    def recorded(self) -> dict[str, list[Part]]:
        """The parts of the chunks of a finished cut, by chunk; nothing where no earlier run finished it."""
        attributes = self._attributes()
        if attributes.get("id") != self.id or not attributes.get("complete"):
            return {}
        return {f"{self.url}/{name}": parts for name, parts in recorded_parts(attributes).items()}

    def vouched(self, _entries: Iterable[Mapping[str, Any]]) -> set[str]:
        """The files that a run has to bring to the disk: none, as a store has what it was given."""
        return set()

    def has(self, chunk: str, parts: Sequence[Part]) -> bool:
        """Whether a chunk is there, of which `parts` are known. Whether its bytes are those is seen when it is read."""
        import fsspec

        files, path = fsspec.core.url_to_fs(chunk)
        # Zarr stores no chunk of zeros alone into an array that it has opened again.
        return bool(parts) and (bool(files.exists(path)) or all(map(_of_zeros, parts)))

    def free(self, chunk: str, pooled: bool = True) -> None:  # noqa: ARG002 (objects have no pool)
        """Remove a chunk that nothing reads any more."""
        import fsspec

        files, path = fsspec.core.url_to_fs(chunk)
        with suppress(FileNotFoundError):
            files.rm(path)

    def finish(self, journal: Journal) -> None:
        """Mark the cut as complete, and so as reusable, with the checksums of its chunks."""
        sums = {chunk.removeprefix(f"{self.url}/"): parts for chunk, parts in chunk_parts(journal.entries).items()}
        _update_attributes(self.url, {SUMS: sums, "complete": True})
        journal.remove()

    def forget_journal(self) -> None:
        """Remove the journal that a run left which ended after it had called the cut complete; not that of a run under way."""
        path = self._journal
        if path.exists():
            with suppress(BadInput, OSError):
                Journal(path).remove()

    def abandon(self, journal: Journal, _created: Path | None = None) -> None:
        """Remove everything that `begin` made."""
        journal.remove()
        self.remove()

    @property
    def kept(self) -> bool:
        """Whether it stays: this job asked for it, or the one that made it."""
        return self.keep or bool(self._attributes().get("keep"))

    def release(self) -> None:
        """Remove the cut after use.

        It stays where this job or the one that made it wants it kept, an output of it is not whole yet, or a job of this machine is
        at work on it.
        """
        if not self.kept or served(self._attributes()):
            try:
                journal = Journal(self._journal)
            except (BadInput, OSError):  # a job is at work on it, or nobody can tell
                return
            try:
                self.remove()
            finally:
                journal.remove()

    def join(self) -> None:
        """Add this job's outputs to those that the cut is kept for."""
        said = self._attributes().get("outputs", [])
        if more := [output for output in self.outputs if output not in said]:
            _update_attributes(self.url, {"outputs": [*said, *more]})

    def remove(self) -> None:
        """Remove the cut."""
        import fsspec

        files, path = fsspec.core.url_to_fs(self.url)
        if files.exists(path):
            files.rm(path, recursive=True)

    @property
    def _journal(self) -> Path:
        return self.directory / f"headrace-{self.id}.journal"

    def _attributes(self) -> dict[str, Any]:
        """The group's attributes; none where there is no group. Its metadata are read bounded, as those on a disk are."""
        import fsspec

        try:
            files, path = fsspec.core.url_to_fs(self.url)
            metadata = parse_json(files.cat_file(f"{path}/{METADATA}", end=MAX_BYTES + 1))
        except (OSError, ValueError, ImportError):
            return {}
        attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
        return attributes if isinstance(attributes, dict) else {}


def store_fault(url: str) -> Problem | None:
    """The reason why nothing here can put scratch at a URL: a store that fsspec does not know, or whose package is missing."""
    import fsspec

    try:
        fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        return Problem(f"--scratch {url}", str(error), "a store that fsspec can write", "Install its package, or give a directory")
    return None


def drop_there(url: str) -> None:
    """Remove a cut at a URL, where there is one that is not to be kept and no job of this machine holds it."""
    with suppress(BadInput, OSError):
        if held := held_there(url, kept=False):
            cut, journal = held
            cut.remove()
            journal.remove()


def held_there(url: str, kept: bool = True) -> tuple[RemoteGroup, Journal] | None:
    """The cut at a URL, and its journal, so that no job of this machine goes on with it; None where there is no cut.

    `kept`: also of one that is to be kept. Raises BadInput where a job of this machine is at work on it.
    """
    attributes = RemoteGroup(url, "", "", "", False, {})._attributes()
    cut = RemoteGroup(url, "", str(attributes.get("id")), "", False, {})
    if attributes.get("headrace") != "scratch" or not cut.id.isalnum() or (attributes.get("keep") and not kept):
        return None
    return cut, Journal(cut._journal)


def _update_attributes(url: str, values: Mapping[str, Any]) -> None:
    """Set attributes of a Zarr group."""
    import zarr

    zarr.open_group(url, mode="r+").attrs.update(dict(values))


def _of_zeros(part: Part) -> bool:
    _, nbytes, digest = part
    return xxhash.xxh3_64_hexdigest(bytes(nbytes)) == digest


def _add_array(group: Any, name: str, array: RemoteArray) -> None:
    """Create the array for a tensor in a Zarr group: uncompressed, as bit patterns."""
    group.create_array(
        name,
        shape=array.shape,
        chunks=array.chunk_shape,
        dtype=of_numpy(array.dtype).zarr,
        compressors=None,
        fill_value=0,
        attributes=array_attributes(array.shape, array.dtype, array.source),
    )
