"""Tensors held in memory, and the values of lazy arrays: what tests of single stages need in the place of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import dask
import dask.array as da
import numpy as np

from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Region, extent, shift, slices
from pipeline.tensor.tensors import Block, LazyTensor

Name = TypeVar("Name")  # a text, or a TensorName
T = TypeVar("T")


class HeldBlock(Block):
    """A region of an array in memory."""

    def __init__(self, values: np.ndarray, region: Region) -> None:
        self.values, self.region = values, region
        self.shape, self.dtype = extent(region), values.dtype

    def read(self, region: Region) -> np.ndarray:
        return self.values[slices(shift(region, [start for start, _ in self.region]))]


@dataclass(frozen=True)
class Held:
    """A LazyTensor whose values are in memory."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def block(self, region: Region) -> Block:
        return HeldBlock(self.values, region)

    def viewed(self, shape: tuple[int, ...], dtype: np.dtype) -> Held:
        return Held(self.values.reshape(-1).view(dtype).reshape(shape))


def block(values: np.ndarray) -> Block:
    return HeldBlock(values, tuple((0, size) for size in values.shape))


def held(tensors: Mapping[Name, np.ndarray]) -> dict[Name, LazyTensor]:
    return {name: Held(values) for name, values in tensors.items()}


def texts(tensors: Mapping[TensorName, T]) -> dict[str, T]:
    """Tensors under the texts of their names, in the same order."""
    return {str(name): tensor for name, tensor in tensors.items()}


def values(array: da.Array) -> np.ndarray:
    """The whole of a lazy array, put together block by block."""
    result = np.empty(array.shape, dtype=array.dtype)
    starts = [np.concatenate([[0], np.cumsum(axis)]).astype(int) for axis in array.chunks]
    for index in product(*map(range, array.numblocks)):
        place = tuple(slice(axis[i], axis[i + 1]) for axis, i in zip(starts, index, strict=True))
        result[place] = np.asarray(dask.get(dict(array.dask), (array.name, *index)))
    return result
