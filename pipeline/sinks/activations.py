"""Scratch of a calibration: the activations of all samples between two layers as a Zarr array, and the ranges of each layer done.

A chunk is a sample. A layer counts as done when its activations and ranges are on the disk, which the journal says; then those
before it are removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.sinks.array_file import write_arrays
from pipeline.sinks.journal import Journal
from pipeline.sinks.scratch import JOURNAL
from pipeline.sinks.syncing import sync_tree
from pipeline.sinks.zarr_files import write_array, write_group
from pipeline.tensor.system_errors import naming


class ActivationScratch:
    """The scratch of one calibration, locked while it is open.

    `shape`: of the activations between two layers, [samples, tokens, hidden]. `identity`: what they depend on; scratch of another
    calibration is made anew. Raises BadInput where another calibration is at work on it.
    """

    def __init__(self, directory: Path, shape: tuple[int, int, int], dtype: np.dtype, source: str, identity: str) -> None:
        self.directory, self.shape, self.dtype, self.source = directory, shape, dtype, source
        directory.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(directory / JOURNAL)
        if self._journal.owner != {"calibration": identity}:
            self._clear()
            self._journal.start({"calibration": identity})
            write_group(directory, {"source": source, "calibration": identity})
        self.layers_done = len([entry for entry in self._journal.entries if entry.get("done")])

    @property
    def nbytes(self) -> int:
        """The most bytes of activations that it holds."""
        return 2 * int(np.prod(self.shape)) * self.dtype.itemsize

    def begin(self, layer: int) -> None:
        """Make the array of what comes out of a layer."""
        shutil.rmtree(self._array(layer), ignore_errors=True)
        write_array(self._array(layer), self.shape, (1, *self.shape[1:]), self.dtype, self.source)

    def write(self, layer: int, sample: int, values: np.ndarray) -> None:
        """Store what comes out of a layer, [tokens, hidden]."""
        path = self._chunk(layer, sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("wb") as file:
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def read(self, layer: int, sample: int) -> np.ndarray:
        """The activations behind a layer, [tokens, hidden]."""
        with naming(self._chunk(layer, sample)):
            stored = np.fromfile(self._chunk(layer, sample), dtype=np.uint8)
            return stored.view(self.dtype).reshape(self.shape[1:])

    def finish(self, layer: int, ranges: Mapping[str, np.ndarray]) -> None:
        """Note that a layer is done, with its ranges; what went into it is removed."""
        write_arrays(self.ranges_of(layer), ranges)
        sync_tree(self._array(layer))
        self._journal.append({"done": [layer], "sums": []})
        self._journal.synced()
        self.layers_done = layer + 1
        shutil.rmtree(self._array(layer - 1), ignore_errors=True)

    def ranges_of(self, layer: int) -> Path:
        """The file of a layer's ranges."""
        return self.directory / f"ranges.{layer}.safetensors"

    def close(self) -> None:
        """Leave it for another run to take up."""
        self._journal.close()

    def remove(self) -> None:
        """Delete all of it."""
        self._clear()
        self._journal.remove()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _clear(self) -> None:
        for path in self._others():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _others(self) -> Iterator[Path]:
        return (path for path in sorted(self.directory.iterdir()) if path.name != JOURNAL)

    def _array(self, layer: int) -> Path:
        return self.directory / f"after.{layer}"

    def _chunk(self, layer: int, sample: int) -> Path:
        return self._array(layer) / "c" / str(sample) / "0" / "0"
