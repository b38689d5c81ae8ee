"""MXFP4 of compressed-tensors (`mxfp4-pack-quantized`) and Quark: e2m1 with a power of two for each 32 in-features.

weight_packed (Quark: weight) uint8 [N, K / 2], the first of two in-features in the low half of a byte; weight_scale uint8 or
float8_e8m0fnu [N, K / 32], an exponent with a bias of 127. Facts: docs/format/quantized-layouts.md, section 9c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.floats import e2m1, e8m0
from stages.quantization.packed_format import OF_ALL, PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_WEIGHTS = ("weight_packed", "weight")
_GROUP = 32
_EXPONENTS = ("uint8", "float8_e8m0fnu")


class Mxfp4(PackedFormat):
    """Modules of MXFP4 weights."""

    name = "mxfp4"
    title = "MXFP4 of compressed-tensors or Quark"
    numbers = True
    proof = "compressed-tensors 0.20, ModelOpt 0.47, AutoRound 0.15, value for value"
    parameters: Mapping[str, PackedParameter] = {
        "weight_packed": PackedParameter(("out", "in")),
        "weight": PackedParameter(("out", "in")),
        "weight_scale": PackedParameter(("out", "group")),
        "input_global_scale": PackedParameter(OF_ALL, dropped="the activations are not MXFP4"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is of bytes, and its scales are exponents."""
        weight = next((parameters[name] for name in _WEIGHTS if name in parameters), None)
        scale = parameters.get("weight_scale")
        if weight is None or scale is None or weight.dtype != np.uint8:
            return False
        return scale.dtype.name in _EXPONENTS and len(scale.shape) == 2

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        """Refuse shapes that do not fit one another, and other groups than of 32."""
        name = next(name for name in _WEIGHTS if name in tensors)
        shape, scales = tensors[name].shape, tensors["weight_scale"].shape
        if len(shape) != 2:
            return [Problem(f"{module}.{name}", f"shape {list(shape)}", "[out-features, in-features / 2]")]
        wanted = (shape[0], 2 * shape[1] // _GROUP)
        if scales == wanted and not 2 * shape[1] % _GROUP:
            return []
        expected = f"{list(wanted)}, one for each {_GROUP} of {2 * shape[1]} in-features"
        return [Problem(f"{module}.weight_scale", f"shape {list(scales)}", expected)]

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`weight`, float32; the rest stays."""
        name = next(name for name in _WEIGHTS if name in parameters)
        packed = parameters[name]
        inputs = {"codes": packed, "scales": parameters["weight_scale"]}
        shape = (packed.shape[0], 2 * packed.shape[1])
        weight = derive("unpack", from_float4, inputs, shape=shape, dtype=np.dtype(np.float32), rows=packed.chunks[0])
        rest = {key: array for key, array in parameters.items() if key not in (name, "weight_scale", "input_global_scale")}
        return {"weight": weight, **rest}


def from_float4(region: Region, codes: Block, scales: Block) -> np.ndarray:
    """float32 of the region: value times the power of two of its group."""
    rows, (left, right) = region
    first, last = left // _GROUP, -(-right // _GROUP)
    stored = np.asarray(codes.read((rows, (first * _GROUP // 2, last * _GROUP // 2))))
    factors = e8m0(np.asarray(scales.read((rows, (first, last)))))
    with meter("unpack", stored.nbytes):
        values = e2m1(stored)
        values.reshape(len(values), -1, _GROUP)[...] *= factors[:, :, None]
        return values[:, left - first * _GROUP : right - first * _GROUP]


FORMAT = Mxfp4()
