"""cast: each value rounded once, to nearest even, from its own type to the target's; a cast commutes with any slice.

A double becomes a number of 16 bits by way of float32, as in torch: rounded twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.model.dtypes import BY_TARGET
from pipeline.model.tables import Layout
from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import Applied, Block, Castable, TensorMap, map_blocks
from stages.quantization.kernels.dispatch import kernels


def target_dtype(name: TensorName, layout: Layout, dtype: str) -> str:
    """The type of a tensor in the target: `dtype`, unless its module has one of its own (a router is float32)."""
    slot = layout.find(name.module)
    return slot.module.stored_dtype(dtype) if slot else dtype


def cast(tensors: TensorMap, layout: Layout, dtype: str) -> TensorMap:
    """Every tensor in the type that a target of `dtype` stores it in; arrays that have it already are the same objects."""
    result = {}
    for name, array in tensors.items():
        if name.parameter not in ("weight", "bias"):
            result[name] = array  # codes and scales have types of their own
            continue
        stored = BY_TARGET[target_dtype(name, layout, dtype)].numpy
        result[name] = array if array.dtype == stored else map_blocks(array, as_type, dtype=stored, to=stored)
    return result


def as_type(block: Block, to: np.dtype) -> Block:
    """A block whose values are cast as they are read, or as they are made, where that is one pass."""
    if isinstance(block, Applied) and isinstance(block.function, Castable):
        function = block.function.into(to)
        return Applied(block.base, function, stage=block.stage, dtype=to, period=block.period, columns=block.columns)
    return Applied(block, AsType(to), stage="cast", dtype=to)


@dataclass(frozen=True)
class AsType:
    """Values in another type. Too large for float16 becomes infinity, as in torch."""

    to: np.dtype

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return kernels().cast(values, self.to)
