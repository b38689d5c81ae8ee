"""Scratch on object storage: a cut as a Zarr group behind an fsspec URL. Each chunk is written and fetched as a whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.sinks.journal import Journal
from pipeline.sinks.scratch import add_array
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


@dataclass(frozen=True)
class RemoteGroup:
    """One cut at `url`. Its journal is a local file, so that only jobs of one machine are kept from writing it at the same time."""

    url: str
    stage: str
    id: str
    source: str
    keep: bool
    arrays: Mapping[tuple[int, str], RemoteArray] = field(repr=False)

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

    def locate(self, _rank: int, tensor: str, region: Region) -> Iterator[Located]:
        """Yield the region itself, at the array's URL and with offset -1: zarr addresses chunks by region, not by bytes."""
        array = self.arrays[0, tensor]
        yield Located(array.url, -1, region)

    def begin(self, tasks: int, fresh: bool) -> Journal:
        """Create the group and its arrays, or resume what an interrupted run left.

        Raises BadInput where another job of this machine is at work on it, or the store cannot be written.
        """
        import zarr

        journal = Journal(self.directory / f"headrace-{self.id}.journal")
        owner = {"headrace": "scratch", "id": self.id, "tasks": tasks}
        if not fresh and journal.owner == owner and self._attributes().get("id") == self.id:
            return journal
        try:
            attributes = {"headrace": "scratch", "stage": self.stage, "id": self.id, "source": self.source}
            group = zarr.create_group(
                self.url, zarr_format=3, overwrite=True, attributes={**attributes, "complete": False, "keep": self.keep}
            )
            for (_, name), array in self.arrays.items():
                add_array(group, name, array)
        except (OSError, ValueError, ImportError) as error:
            journal.remove()
            raise BadInput([Problem(f"--scratch {self.url}", str(error), "a store that can be written")]) from None
        journal.start(owner)
        return journal

    def finish(self, journal: Journal, *_: object) -> None:
        """Mark the cut as complete, and so as reusable."""
        import zarr

        zarr.open_group(self.url, mode="r+").attrs["complete"] = True
        journal.remove()

    def abandon(self, journal: Journal, _created: Path | None = None) -> None:
        """Remove everything that `begin` made."""
        journal.remove()
        self.remove()

    def release(self) -> None:
        """Remove the cut after use, unless this job or the one that made it wants it kept."""
        if not (self.keep or self._attributes().get("keep")):
            self.remove()

    def remove(self) -> None:
        """Remove the cut."""
        import fsspec

        files, path = fsspec.core.url_to_fs(self.url)
        if files.exists(path):
            files.rm(path, recursive=True)

    def _attributes(self) -> dict[str, Any]:
        import zarr

        try:
            return dict(zarr.open_group(self.url, mode="r").attrs)
        except (OSError, ValueError):
            return {}
