"""NVFP4: e2m1 weights with a float8 scale for each 16 in-features, one scale of all, and one of the activations.

In the places of ModelOpt's export for TensorRT-LLM: weight uint8 [N, K / 2], weights_scaling_factor float8_e4m3fn [N, K / 16],
weights_scaling_factor_2 and activation_scaling_factor float32 [1]. The loader interleaves the scales and computes alpha, so that
passing codes through is splitting alone. Facts: docs/format/runtime-1.2.md, section h2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pipeline.model.quantization import NVFP4_GROUP
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block, Parameter, plain
from stages.quantization.floats import e4m3
from stages.quantization.targets.fp8 import FLOAT8, Entries, largest

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

ONE = Fraction(1)
_WEIGHT = Parameter(axes=(("out", ONE), ("in", Fraction(1, 2))))
_SCALES = Parameter(axes=(("out", ONE), ("group", Fraction(1, NVFP4_GROUP))), working_bytes=10)


def pack(parts: Sequence[Mapping[str, BlockArray]]) -> tuple[list[Entries], Entries]:
    """The weight and scales of each part of a fused module, and what they share.

    That is the largest scale of all, which the parts' own scales are brought to where the quantizer has not done so, and the
    largest of the activations'.
    """
    common = largest([part["global_scale"] for part in parts])
    own = []
    for part in parts:
        scales = part["block_scale"]
        if len(parts) > 1:
            inputs = {"scales": scales, "scale": part["global_scale"], "common": common}
            scales = derive("quantize", rescaled, inputs, shape=scales.shape, dtype=FLOAT8, rows=scales.chunks[0])
        own.append({"weight": (part["fp4"], _WEIGHT), "weights_scaling_factor": (scales, _SCALES)})
    activations, scalar = largest([part["input_scale"] for part in parts]), plain("global_scale")
    return own, {"weights_scaling_factor_2": (common, scalar), "activation_scaling_factor": (activations, scalar)}


def rescaled(region: Region, scales: Block, scale: Block, common: Block) -> np.ndarray:
    """float8 scales under one scale of all as those under another; unchanged where the two are equal."""
    values = np.asarray(scales.read(region))
    own, other = (np.float32(np.asarray(each.read(whole(each.shape))).reshape(-1)[0]) for each in (scale, common))
    if own == other:
        return values
    with meter("quantize", values.nbytes):
        return (e4m3(values) * own / other).astype(FLOAT8)
