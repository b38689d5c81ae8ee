"""The int8 codes of a source, with one scale a row, in the places of SmoothQuant: W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN.

Nothing is smoothed: `smoother` is ones, and norms stay as they are. Facts: docs/format/quantized-layouts.md, section 4d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, extent
from pipeline.tensor.tensors import Block, Parameter
from stages.quantization.finite import finite
from stages.quantization.targets.smoothquant import BY_COLUMN, BY_ROW, MATRIX, Packed
from stages.quantization.targets.smoothquant_values import FLOAT32, INT8

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray


def pack(name: str, parameters: Mapping[str, BlockArray]) -> Packed:
    """`weight` int8 [out, in] and `per_channel_scale` float32 [1, out] of codes of 8 bits with one group a row.

    `name`: the weight's in the source, for what is wrong with its values.
    """
    codes, scales, offsets = parameters["codes8"], parameters["scales"], parameters["offsets"]
    weight = derive("quantize", signed, {"codes": codes}, shape=codes.shape, dtype=INT8, rows=codes.chunks[0])
    inputs = {"scales": scales, "offsets": offsets}
    factors = derive("quantize", scale_of, inputs, shape=scales.shape, dtype=FLOAT32, name=name)
    return {"weight": (weight, MATRIX), "per_channel_scale": (factors, BY_ROW)}


def no_smoother(parameters: Mapping[str, BlockArray]) -> tuple[BlockArray, Parameter]:
    """float32 [1, in]: ones."""
    codes = parameters["codes8"]
    return derive("quantize", ones, {"codes": codes}, shape=(1, codes.shape[-1]), dtype=FLOAT32), BY_COLUMN


def signed(region: Region, codes: Block) -> np.ndarray:
    """int8 of unsigned codes, whose middle is 128."""
    values = np.asarray(codes.read(region))
    with meter("quantize", values.nbytes):
        return (values ^ np.uint8(0x80)).view(np.int8)


def scale_of(region: Region, scales: Block, offsets: Block, name: str) -> np.ndarray:
    """float32 [1, n]. Raises BadInput naming the tensor where its codes have zero points, which these kernels do not read, and
    where a scale is not finite.
    """
    if np.any(offsets.read(region)):
        raise BadInput([Problem(name, "zero points", "codes that are symmetric", "Give --quantization int8 --dequantize")])
    return finite(np.asarray(scales.read(region)), name).astype(np.float32)


def ones(region: Region, codes: Block) -> np.ndarray:  # noqa: ARG001
    """Factors that change nothing."""
    return np.ones(extent(region), dtype=np.float32)
