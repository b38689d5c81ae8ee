"""NVFP4, as ModelOpt exports it for Hugging Face (nvidia/*-FP4) and as compressed-tensors writes it (`nvfp4-pack-quantized`).

ModelOpt: weight uint8 [N, K / 2], two e2m1 of consecutive in-features a byte, the first in the low half; weight_scale float8_e4m3fn
[N, K / 16]; weight_scale_2 float32; input_scale float32: weight = value * weight_scale * weight_scale_2. compressed-tensors:
weight_packed, weight_scale, weight_global_scale and input_global_scale, which divide.
Facts: docs/format/quantized-layouts.md, section 9c.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pipeline.errors import Problem
from pipeline.model.quantization import NVFP4, NVFP4_GROUP
from pipeline.tensor.derived import derive
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.packed_format import OF_ALL, Modules, PackedFormat, PackedParameter
from stages.quantization.sources.fp8_scaled import flat

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

FLOAT32 = np.dtype(np.float32)
# The two writers' names of the weight, and of the scale of all: ModelOpt's is multiplied, compressed-tensors' divides.
_WEIGHTS, _GLOBAL = ("weight", "weight_packed"), {"weight_scale_2": "flat", "weight_global_scale": "inverse"}
_INPUT = {"input_scale": "flat", "input_global_scale": "inverse"}


class Nvfp4(PackedFormat):
    """Modules of NVFP4 weights."""

    name = "nvfp4"
    title = "NVFP4 of ModelOpt or compressed-tensors"
    keeps = ("NVFP4",)
    proof = "compressed-tensors 0.20, up to its rounding to bfloat16; ModelOpt 0.47, up to the last bit of float32"
    parameters: Mapping[str, PackedParameter] = {
        "weight": PackedParameter(("out", "in")),
        "weight_packed": PackedParameter(("out", "in")),
        "weight_scale": PackedParameter(("out", "group")),
        "weight_scale_2": PackedParameter(OF_ALL),
        "weight_global_scale": PackedParameter(OF_ALL),
        "input_scale": PackedParameter(OF_ALL, becomes="input_scale"),
        "input_global_scale": PackedParameter(OF_ALL, becomes="input_scale"),
        "pre_quant_scale": PackedParameter(("in",), becomes="prequant"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is of bytes, and its scales are float8."""
        weight = next((parameters[name] for name in _WEIGHTS if name in parameters), None)
        scale = parameters.get("weight_scale")
        return weight is not None and scale is not None and weight.dtype == np.uint8 and scale.dtype == ml_dtypes.float8_e4m3fn

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        """Refuse shapes that do not fit one another, other groups than of 16, and a scale of all that is missing."""
        name = next(name for name in _WEIGHTS if name in tensors)
        shape, scales = tensors[name].shape, tensors["weight_scale"].shape
        if len(shape) != 2:
            return [Problem(f"{module}.{name}", f"shape {list(shape)}", "[out-features, in-features / 2]")]
        wanted = (shape[0], 2 * shape[1] // NVFP4_GROUP)
        if scales != wanted or 2 * shape[1] % NVFP4_GROUP:
            expected = f"{list(wanted)}, one for each {NVFP4_GROUP} of {2 * shape[1]} in-features"
            return [Problem(f"{module}.weight_scale", f"shape {list(scales)}", expected)]
        if not _GLOBAL.keys() & tensors.keys():
            return [Problem(f"{module}.weight_scale_2", "no such tensor", "the scale of all of the module's weights")]
        return [
            Problem(f"{module}.{key}", f"shape {list(tensors[key].shape)}", "one scale")
            for key in (*_GLOBAL, *_INPUT)
            if key in tensors and math.prod(tensors[key].shape) != 1
        ]

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`fp4`, `block_scale`, `global_scale`, and the scale of activations; the rest stays."""
        result = {}
        for name, array in parameters.items():
            if name in _WEIGHTS:
                result["fp4"] = array
            elif name == "weight_scale":
                result["block_scale"] = array
            elif name in _GLOBAL:
                result["global_scale"] = _scalar(array, _GLOBAL[name])
            elif name in _INPUT:
                result["input_scale"] = _scalar(array, _INPUT[name])
            else:
                result["prequant" if name == "pre_quant_scale" else name] = array
        return result

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """NVFP4, where every module has a scale of its activations and no factors of them; else they can only be dequantized."""
        fits = all(_INPUT.keys() & tensors.keys() and "pre_quant_scale" not in tensors for tensors in modules.values())
        return (NVFP4, NVFP4_GROUP) if fits else (None, 0)


def _scalar(array: BlockArray, how: str) -> BlockArray:
    make = inverse if how == "inverse" else flat
    return derive("unpack", make, {"values": array}, shape=(1,), dtype=FLOAT32)


def inverse(region: Region, values: Block) -> np.ndarray:
    """float32 [1]: a scale that divides as one that multiplies."""
    with np.errstate(divide="ignore"):
        return np.float32(1) / flat(region, values)


FORMAT = Nvfp4()
