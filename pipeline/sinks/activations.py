"""Scratch of a calibration: the activations of all samples between two layers as a Zarr array, and the ranges of each layer done.

A chunk is a sample. A layer is done when its ranges are there, which are written when its activations are on the disk; then those
before it are removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.sinks.array_file import write_arrays
from pipeline.sinks.journal import Journal
from pipeline.sinks.reserve import missing, unmake
from pipeline.sinks.scratch import JOURNAL, remove_empty_root, served
from pipeline.sinks.syncing import sync_tree
from pipeline.sinks.zarr_files import read_attributes, write_array, write_group
from pipeline.tensor.system_errors import naming, refusal

STAGE = "calibrate"
TOKENS = "tokens.safetensors"  # in the directory: those that were made of texts


@dataclass(frozen=True)
class Activations:
    """The files of one calibration's scratch.

    `shape`: of the activations between two layers, [samples, tokens, hidden]. `source`: the model's place, for people.
    `identity`: of all that the values depend on.
    """

    directory: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    source: str
    identity: str

    @property
    def nbytes(self) -> int:
        """The most bytes of activations that it holds."""
        return 2 * int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def layers_done(self) -> int:
        """How many layers are done, from the first one on."""
        layer = 0
        while self.ranges_of(layer).is_file():
            layer += 1
        return layer

    def samples_done(self, layer: int) -> int:
        """How many samples have gone through a layer that is not done yet."""
        try:
            return sum(1 for _ in (self._array(layer) / "c").iterdir())
        except OSError:  # it is not begun, or just removed
            return 0

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
        sync_tree(self._array(layer))
        write_arrays(self.ranges_of(layer), ranges)
        shutil.rmtree(self._array(layer - 1), ignore_errors=True)

    def ranges_of(self, layer: int) -> Path:
        """The file of a layer's ranges."""
        return self.directory / f"ranges.{layer}.safetensors"

    def _array(self, layer: int) -> Path:
        return self.directory / f"after.{layer}"

    def _chunk(self, layer: int, sample: int) -> Path:
        return self._array(layer) / "c" / str(sample) / "0" / "0"


class ActivationScratch:
    """The scratch of one calibration, locked while it is open.

    `keep`: it stays, and no other conversion may take it away. `outputs`: the directories that are written of it by several jobs,
    for which alone it is kept. Scratch of another calibration in that place is made anew. Raises BadInput where another run is at
    work on it, or it cannot be written.
    """

    def __init__(self, files: Activations, keep: bool = False, outputs: Iterable[str] = ()) -> None:
        self.files = files
        owner = {"calibration": files.identity}
        created = missing(files.directory)
        try:
            files.directory.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(files.directory / JOURNAL)
        except OSError as error:
            unmake(files.directory, created)
            raise refusal(error, files.directory, "a directory that can be written", "choose another --scratch") from None
        if self._journal.owner != owner:
            self._clear()
            self._journal.start(owner)
        before = read_attributes(files.directory)
        asked = {"keep": keep or bool(before.get("keep")), "outputs": list(dict.fromkeys((*before.get("outputs", ()), *outputs)))}
        said = {"headrace": "scratch", "stage": STAGE, "source": files.source, **asked}
        write_group(files.directory, {**said, **owner})

    @property
    def kept(self) -> bool:
        """Whether it stays: this run asked for it, or one before it, and not for outputs alone that are all whole now."""
        attributes = read_attributes(self.files.directory)
        return bool(attributes.get("keep")) and not served(attributes)

    def close(self) -> None:
        """Leave it for another run to take up."""
        self._journal.close()

    def remove(self) -> None:
        """Delete all of it."""
        self._clear()
        self._journal.remove()
        shutil.rmtree(self.files.directory, ignore_errors=True)
        remove_empty_root(self.files.directory.parent)

    def _clear(self) -> None:
        for path in sorted(self.files.directory.iterdir()):
            if not path.name.startswith(JOURNAL):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
