"""W8A16 and W4A16 of a source's own codes: symmetric, with one scale a row.

Facts: docs/format/quantized-layouts.md, sections 3 and 10. Codes and scales are the source's, whatever the ranks: a row-parallel
linear has the same scale of a row on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, Parameter
from stages.quantization.kernels.layout import KernelLayout
from stages.quantization.targets.groupwise import held, pack_gptq

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

ONE = Fraction(1)


def pack_rows(
    name: str, parameters: Mapping[str, BlockArray], layout: KernelLayout, dtype: np.dtype, target: str, rows: int
) -> dict[str, tuple[BlockArray, Parameter]]:
    """`weight` and `per_channel_scale` of codes with one group a row.

    `name`: the weight's in the source, for what is wrong with its values. `dtype`, called `target`: the model's type. `rows`:
    out-features of a block of work.
    """
    weight, packed = pack_gptq(parameters, layout, dtype, target, rows)["weight"]
    header = (("in", ONE), ("out", Fraction(layout.bits, 8)))
    scales, offsets = parameters["scales"], parameters["offsets"]
    inputs = {"scales": scales, "offsets": offsets}
    factors = derive("quantize", scale_of, inputs, shape=scales.shape[1:], dtype=dtype, to=dtype, name=name, bits=layout.bits)
    return {
        "weight": (weight, Parameter(packed.axes, header, "int8", packed.working_bytes)),
        "per_channel_scale": (factors, Parameter(axes=(("out", ONE),))),
    }


def scale_of(region: Region, scales: Block, offsets: Block, to: np.dtype, name: str, bits: int) -> np.ndarray:
    """[n] in the model's type.

    Raises BadInput naming the tensor where its codes have zero points, which these kernels do not read, or where the type holds
    a scale not.
    """
    both = ((0, 1), region[0])
    if np.any(offsets.read(both)):
        raise BadInput([Problem(name, "zero points", "codes that are symmetric", "Give --requantize, or --dequantize")])
    return held(np.asarray(scales.read(both))[0], to, name, 1 << (bits - 1))
