"""GGUF's block formats: packed rows to float32 values, block by block, as the `gguf` package has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.tensors import Applied, Block, LazyTensor, map_blocks
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.packed_format import PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

PREFIX = "gguf_"
FLOAT32 = np.dtype(np.float32)


class Gguf(PackedFormat):
    """GGUF's modules."""

    name = "gguf"
    title = "GGUF"
    numbers = True
    proof = "the package gguf, value for value"
    parameters: Mapping[str, PackedParameter] = {}

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether one of a module's parameters is a packed GGUF weight, `gguf_` and the name of its type."""
        return any(parameter.startswith(PREFIX) for parameter in parameters)

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        """Nothing: the reader has seen that the types can be unpacked."""
        return []

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """Packed uint8 [rows, bytes] (or [experts, rows, bytes]) becomes `weight`, float32 [rows, elements]; the rest stays."""
        import gguf

        result = {}
        for parameter, array in parameters.items():
            if not parameter.startswith(PREFIX):
                result[parameter] = array
                continue
            kind = parameter.removeprefix(PREFIX)
            elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            columns = array.shape[-1] // size * elements
            result["weight"] = map_blocks(array, dequantize, dtype=FLOAT32, columns=columns, kind=kind, elements=columns)
        return result


def dequantize(block: Block, kind: str, elements: int) -> Block:
    """A packed block as one of float32 values, `elements` a row."""
    return Applied(block, Dequantize(kind), stage="unpack", dtype=FLOAT32, columns=elements)


@dataclass(frozen=True)
class Dequantize:
    """Packed rows uint8 [..., bytes] to numbers [..., elements], float32 or cast from it."""

    kind: str
    dtype: np.dtype = FLOAT32

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return kernels().gguf_numbers(values, self.kind, self.dtype)

    def into(self, dtype: np.dtype) -> Dequantize:
        """The same numbers, each cast once: while they are in the processor's cache."""
        return replace(self, dtype=dtype)


FORMAT = Gguf()
