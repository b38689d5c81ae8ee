"""FP8 of numbers, with one scale a matrix, and one of its activations by what a calibration measured.

The parts of a fused module have the scale of the largest of all, so that each value is rounded once.
Facts: docs/format/quantized-layouts.md, sections 4c and 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadInput
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent, whole
from pipeline.tensor.reduced import reduce
from pipeline.tensor.tensors import X_RANGE, Block, plain
from stages.quantization.finite import not_finite
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.targets.fp8 import FLOAT8, FLOAT32, MATRIX, Entries

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

LARGEST = np.float32(448)
_ELEMENTS = 1 << 20  # of a weight that are worked on at once


def pack(
    names: Sequence[str], weights: Sequence[BlockArray], parts: Sequence[Mapping[str, BlockArray]]
) -> tuple[list[Entries], Entries]:
    """The weight of each part of a module, and the scales that they share, as fp8.pack_tensor has them.

    `names`: of the weights in the source. `weights`: [out, in] in 16 bits. `parts`: with the ranges of their inputs.
    """
    inputs = {f"part{number}": weight for number, weight in enumerate(weights)}
    scale = reduce("quantize", scale_of, inputs, shape=(1,), dtype=FLOAT32, names=tuple(names))
    packed: list[Entries] = []
    for weight in weights:
        codes = derive(
            "quantize", codes_of, {"weight": weight, "scale": scale}, shape=weight.shape, dtype=FLOAT8, rows=weight.chunks[0]
        )
        packed.append({"weight": (codes, MATRIX)})
    activations = activation_scale(parts)
    size = plain("tensor_scale")
    return packed, {"weights_scaling_factor": (as_array(scale), size), "activation_scaling_factor": (activations, size)}


def activation_scale(parts: Sequence[Mapping[str, BlockArray]]) -> BlockArray:
    """float32 [1]: the largest input of some modules by 448. `parts`: with the ranges of their inputs."""
    ranges = {f"range{number}": part[X_RANGE] for number, part in enumerate(parts)}
    return derive("quantize", by_largest, ranges, shape=(1,), dtype=FLOAT32)


def cache_scale(outputs: Sequence[BlockArray]) -> BlockArray:
    """float32 [1], of an FP8 cache: the largest of the keys' and the values' outputs, by 448.

    Facts: docs/format/quantized-layouts.md, section 4e.
    """
    ranges = {f"range{number}": output for number, output in enumerate(outputs)}
    return derive("quantize", by_largest, ranges, shape=(1,), dtype=FLOAT32)


def as_array(scale: BlockArray) -> BlockArray:
    """float32 [1]: a scale as an array that is written."""
    return derive("quantize", same, {"scale": scale}, shape=(1,), dtype=FLOAT32)


def scale_of(region: Region, names: Sequence[str], **weights: Block) -> np.ndarray:  # noqa: ARG001
    """float32 [1]: the largest magnitude by 448; 1 where all are 0. Raises BadInput naming a weight that is not finite."""
    largest = np.float32(0)
    for name, weight in zip(names, weights.values(), strict=True):
        for rows in _pieces(weight, 0, weight.shape[0]):
            values = _wide(weight, (rows, (0, weight.shape[1])))
            with meter("quantize", values.nbytes):
                largest = np.maximum(largest, np.maximum(values.max(), -values.min()))
        if not np.isfinite(largest):
            raise BadInput([not_finite(name)])
    return np.array([largest / LARGEST if largest else 1], dtype=np.float32)


def codes_of(region: Region, weight: Block, scale: Block) -> np.ndarray:
    """float8 of the region: each value divided by the scale, rounded once."""
    (first, last), columns = region
    codes, divisor = np.empty(extent(region), dtype=FLOAT8), np.asarray(scale.read(((0, 1),)))
    for rows in _pieces(weight, first, last):
        values = _wide(weight, (rows, columns))
        with meter("quantize", values.nbytes):
            values = np.clip(values / divisor, -LARGEST, LARGEST)
            codes[rows[0] - first : rows[1] - first] = values.astype(FLOAT8)
    return codes


def by_largest(region: Region, **ranges: Block) -> np.ndarray:
    """float32 [1]: the largest of some ranges by 448."""
    largest = max(np.asarray(each.read(whole(each.shape))).max() for each in ranges.values())
    return np.full(extent(region), np.float32(largest) / LARGEST, dtype=np.float32)


def same(region: Region, scale: Block) -> np.ndarray:
    """float32 of the region."""
    return np.asarray(scale.read(region))


def _wide(weight: Block, region: Region) -> np.ndarray:
    return kernels().cast(np.asarray(weight.read(region)), FLOAT32)


def _pieces(weight: Block, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Intervals of rows that are worked on at once."""
    count = max(_ELEMENTS // weight.shape[1], 1)
    for start in range(first, last, count):
        yield start, min(start + count, last)
