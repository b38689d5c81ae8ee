"""NVFP4: e2m1 weights with a float8 scale for each 16 in-features, one scale of all, and one of the activations.

In the places of ModelOpt's export for TensorRT-LLM: weight uint8 [N, K / 2], weights_scaling_factor float8_e4m3fn [N, K / 16],
weights_scaling_factor_2 and activation_scaling_factor float32 [1]. The loader interleaves the scales and computes alpha, so that
passing codes through is splitting alone. Facts: docs/format/runtime-1.2.md, section h2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.model.quantization import NVFP4_GROUP
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block, Parameter, plain
from stages.quantization.finite import finite
from stages.quantization.floats import e4m3
from stages.quantization.targets.fp8 import FLOAT8, Entries, largest

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

ONE = Fraction(1)
_WEIGHT = Parameter(axes=(("out", ONE), ("in", Fraction(1, 2))))
_SCALES = Parameter(axes=(("out", ONE), ("group", Fraction(1, NVFP4_GROUP))), working_bytes=10)


def pack(names: Sequence[str], parts: Sequence[Mapping[str, BlockArray]]) -> tuple[list[Entries], Entries]:
    """The weight and scales of each part of a fused module, and what they share.

    That is the largest scale of all, which the parts' own scales are brought to where the quantizer has not done so, and the
    largest of the activations'. `names`: of the weights in the source, for what is wrong with their scales.
    """
    common = largest([part["global_scale"] for part in parts], names)
    own = []
    for name, part in zip(names, parts, strict=True):
        scales = part["block_scale"]
        inputs = {"scales": scales, "scale": part["global_scale"], "common": common}
        like: dict[str, Any] = {"shape": scales.shape, "dtype": FLOAT8, "rows": scales.chunks[0]}
        scales = derive("quantize", rescaled, inputs, **like, name=name)
        own.append({"weight": (part["fp4"], _WEIGHT), "weights_scaling_factor": (scales, _SCALES)})
    activations, scalar = largest([part["input_scale"] for part in parts], names), plain("global_scale")
    return own, {"weights_scaling_factor_2": (common, scalar), "activation_scaling_factor": (activations, scalar)}


def rescaled(region: Region, scales: Block, scale: Block, common: Block, name: str) -> np.ndarray:
    """float8 scales under one scale of all as those under another; unchanged where the two are equal.

    Raises BadInput naming the weight where a scale is not finite.
    """
    values = finite(np.asarray(scales.read(region)), name)
    own, other = (np.float32(np.asarray(each.read(whole(each.shape))).reshape(-1)[0]) for each in (scale, common))
    if own == other:
        return values
    with meter("quantize", values.nbytes):
        return (e4m3(values) * own / other).astype(FLOAT8)
