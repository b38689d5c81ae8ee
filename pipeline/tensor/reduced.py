"""Arrays that stand for whole others, such as the largest magnitudes of the columns of some matrices: made once a task, then kept.

Each block of codes takes them all, and making them reads all of the others. They are small, so that the task that first reads one
keeps it; the blocks that take it belong to one task (pipeline/planning/phases.py).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.tensor.arrays import BlockArray, Index, Maker
from pipeline.tensor.derived import NOTHING, Derivation, DerivedArray, Make, derivation_of
from pipeline.tensor.placement import Region, slices, whole
from pipeline.tensor.tensors import Block


class Reduced(Block):
    """A block whose values are all made when any is first asked for. `made`: that makes them."""

    def __init__(self, made: Block) -> None:
        self.made, self.shape, self.dtype = made, made.shape, made.dtype
        self._lock, self._kept = threading.Lock(), NOTHING

    def read(self, region: Region) -> np.ndarray:
        with self._lock:
            if self._kept is NOTHING:
                self._kept = self.made.read(whole(self.shape))
        return self._kept[slices(region)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, (self.made,)


class OpenReduced(NamedTuple):
    """Makes the block of a reduced array."""

    kind: Derivation
    values: tuple[Any, ...]
    region: Region

    def __call__(self, *blocks: Block) -> Block:
        return Reduced(self.kind.block(self.region, self.values, blocks))


class ReducedArray(DerivedArray):
    """A small array of one chunk that takes all of its inputs."""

    __slots__ = ()

    def make(self, index: Index) -> Maker:
        return OpenReduced(self.kind, self.values, self.grid.regions[index])


def reduce(
    label: str, make: Make, inputs: Mapping[str, BlockArray], *, shape: Sequence[int], dtype: np.dtype, **arguments: Any
) -> BlockArray:
    """An array that is kept once it is made. The arguments are those of `derive`."""
    kind, arrays = derivation_of(label, make, inputs, shape=shape, dtype=dtype, names=tuple(arguments))
    return ReducedArray(kind, arrays, tuple(arguments.values()))
