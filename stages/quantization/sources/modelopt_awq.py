"""ModelOpt's INT4-AWQ in Hugging Face's layout.

weight uint8 [N / 2, K]: out-feature 2 i in the low nibble, 2 i + 1 in the high one, two's complement; weight_scale float32 [N, K
/ g]; pre_quant_scale [K], by which the activations are multiplied, where it is not folded into the module before.
Facts: docs/format/quantized-layouts.md, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.model.quantization import AWQ
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.integers import no_offsets, transposed
from stages.quantization.packed_format import OF_ALL, Modules, PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray


class ModelOptAwq(PackedFormat):
    """ModelOpt's modules."""

    name = "modelopt-awq"
    title = "ModelOpt INT4-AWQ"
    keeps = ("W4A16_AWQ",)
    proof = "ModelOpt 0.47's simulated quantization: the same codes, but 3 in 10,000, where its packing rounds otherwise"
    parameters: Mapping[str, PackedParameter] = {
        "weight": PackedParameter(("out", "in"), rows=2),
        "weight_scale": PackedParameter(("out", "group")),
        "pre_quant_scale": PackedParameter(("in",), becomes="prequant"),
        "input_scale": PackedParameter(OF_ALL, becomes="input_scale"),
        "weight_scale_2": PackedParameter(OF_ALL),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is packed two out-features a byte, with scales by group that are no small floats."""
        if not {"weight", "weight_scale"} <= parameters.keys() or parameters["weight"].dtype != np.uint8:
            return False
        return bool(parameters["weight_scale"].dtype.itemsize > 1)

    def module_settings(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """With what `quantized_layers` of a model in several algorithms (MIXED_PRECISION) says of the module."""
        layers = settings.get("quantized_layers")
        own = layers.get(module) if isinstance(layers, Mapping) else None
        return {**settings, **own} if isinstance(own, Mapping) else settings

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse shapes that do not fit one another or the settings, and W4A8_AWQ, which has scales on top of those of groups."""
        if "weight_scale_2" in tensors:
            remedy = "Convert the model that it was quantized from"
            return [Problem(f"{module}.weight_scale_2", "a module in W4A8_AWQ", "W4A16_AWQ, FP8 or NVFP4", remedy)]
        shape, scales = tensors["weight"].shape, tensors["weight_scale"].shape
        if len(shape) != 2 or shape[1] % 2:
            return [Problem(f"{module}.weight", f"shape {list(shape)}", "[out-features / 2, in-features]")]
        half, features = shape
        size = settings.get("group_size") or (features // scales[-1] if scales and scales[-1] else 0)
        if isinstance(size, bool) or not isinstance(size, int):
            return [Problem(f"{module}.weight", f"group_size {size!r} in the settings", "a whole number")]
        if len(scales) != 2 or scales[0] != 2 * half or not size or scales[1] * size != features:
            return [
                Problem(f"{module}.weight_scale", f"shape {list(scales)}", f"[{2 * half}, {features} / {size or 'group size'}]")
            ]
        return []

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`codes4`, `scales`, `offsets`, and `prequant` where the module has one; the rest stays."""
        weight, scale = parameters["weight"], parameters["weight_scale"]
        shape = (2 * weight.shape[0], weight.shape[1] // 2)
        codes = derive("unpack", read_codes, {"packed": weight}, shape=shape, dtype=np.dtype(np.uint8))
        scales = derive("unpack", transposed, {"values": scale}, shape=scale.shape[::-1], dtype=scale.dtype)
        offsets = derive("unpack", no_offsets, {"scales": scales}, shape=scales.shape, dtype=np.dtype(np.int16))
        rest = {("prequant" if name == "pre_quant_scale" else name): array for name, array in parameters.items()}
        return {**{name: array for name, array in rest.items() if name not in ("weight", "weight_scale")},
                "codes4": codes, "scales": scales, "offsets": offsets}  # fmt: skip

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """W4A16_AWQ."""
        first = next(iter(modules.values()))
        return AWQ, first["weight"].shape[1] // first["weight_scale"].shape[1]


def read_codes(region: Region, packed: Block) -> np.ndarray:
    """uint8 [n, K / 2]: unsigned codes of two in-features a byte, of bytes that hold two out-features."""
    first, last = region[0][0] // 2, -(-region[0][1] // 2)
    values = packed.read(((first, last), (0, packed.shape[1])))
    with meter("unpack", values.nbytes):
        unsigned = values ^ np.uint8(0x88)
        even, odd = unsigned[:, 0::2], unsigned[:, 1::2]
        result = np.empty((last - first, 2, even.shape[1]), dtype=np.uint8)
        result[:, 0] = (even & 15) | (odd << 4)
        result[:, 1] = (even >> 4) | (odd & 0xF0)
    rows = result.reshape(-1, even.shape[1])[region[0][0] - 2 * first : region[0][1] - 2 * first]
    return rows[:, slice(*region[1])]


FORMAT = ModelOptAwq()
