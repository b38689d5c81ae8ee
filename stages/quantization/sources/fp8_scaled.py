"""Float8 weights with their scales: ModelOpt's and compressed-tensors' FP8, and fbgemm's (Llama-3.1-405B-FP8).

weight float8_e4m3fn [N, K]; weight_scale of the whole ([] or [1]) or of each out-feature ([N, 1] or [N]); input_scale where the
activations' is static; input_scale_ub, fbgemm's bound of dynamic ones, which the settings say too.
Facts: docs/format/quantized-layouts.md, sections 7 and 9b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pipeline.errors import Problem
from pipeline.model.quantization import BOUND, FP8, FP8_ROWWISE, clamp_of
from pipeline.tensor.derived import derive
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.compressed_settings import quantized_activations, schemes
from stages.quantization.packed_format import OF_ALL, Modules, PackedFormat, PackedParameter

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

FLOAT32 = np.dtype(np.float32)


class ScaledFp8(PackedFormat):
    """Modules of float8 weights."""

    name = "float8"
    title = "FP8 of ModelOpt or compressed-tensors or fbgemm"
    keeps = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    proof = (
        "NVIDIA's converter 0.17, its files byte for byte (ModelOpt, fbgemm); ModelOpt 0.47 and compressed-tensors 0.19, value for "
        "value"
    )
    parameters: Mapping[str, PackedParameter] = {
        "weight_scale": PackedParameter(("out", "one")),
        "input_scale": PackedParameter(OF_ALL, becomes="input_scale"),
        "input_scale_ub": PackedParameter(OF_ALL, dropped="the bound of activations is written from the settings"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is float8 and has a scale."""
        return {"weight", "weight_scale"} <= parameters.keys() and parameters["weight"].dtype == ml_dtypes.float8_e4m3fn

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse scales by block, and a bound of activations other than that of the settings."""
        shape, scale = tensors["weight"].shape, tensors["weight_scale"]
        if len(shape) != 2:
            return [Problem(f"{module}.weight", f"shape {list(shape)}", "a matrix")]
        rows, problems = shape[0], []
        if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            expected = f"one scale, or one for each of {rows} out-features"
            problems.append(Problem(f"{module}.weight_scale", f"shape {list(scale.shape)}", expected))
        for name in ("input_scale", "input_scale_ub"):
            if name in tensors and math.prod(tensors[name].shape) != 1:
                problems.append(Problem(f"{module}.{name}", f"shape {list(tensors[name].shape)}", "one scale"))
        said = clamp_of(settings)  # one that is no bound is a problem of the settings
        if "input_scale_ub" in tensors and said is not None and not problems:
            bound = float(np.asarray(tensors["input_scale_ub"].block(whole(tensors["input_scale_ub"].shape))).reshape(-1)[0])
            if bound != said:
                expected = f"{said:g}, {BOUND} of the settings or its default"
                problems.append(Problem(f"{module}.input_scale_ub", f"{bound:g}", expected))
        return problems

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`fp8` with `tensor_scale` or `channel_scale`, and the scale of activations, all float32; the rest stays."""
        rows = parameters["weight"].shape[0]
        result = {}
        for name, array in parameters.items():
            if name == "weight_scale":
                kind = "channel_scale" if array.size == rows and rows > 1 else "tensor_scale"
                result[kind] = derive("unpack", flat, {"values": array}, shape=(array.size,), dtype=FLOAT32)
            elif name == "input_scale":
                result[name] = derive("unpack", flat, {"values": array}, shape=(1,), dtype=FLOAT32)
            elif name != "input_scale_ub":
                result["fp8" if name == "weight" else name] = array
        return result

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """FP8 where every module has one scale, and one of the activations, which else are of no use: FP8_PER_CHANNEL_PER_TOKEN."""
        if all("input_scale" in tensors for tensors in modules.values()) and not all(map(_by_row, modules.values())):
            return FP8, 0
        return FP8_ROWWISE, 0

    def notes(self, settings: Mapping[str, Any], algorithm: str) -> list[str]:
        """That activations which the source leaves in 16 bits are quantized (compressed-tensors without `input_activations`)."""
        if not schemes(settings, "weights") or quantized_activations(settings):
            return []
        return [f"the source's kernels take activations in 16 bits: those of {algorithm} quantize them; --dequantize keeps 16 bits"]


def _by_row(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a module has a scale for each out-feature."""
    return math.prod(tensors["weight_scale"].shape) == tensors["weight"].shape[0] > 1


def flat(region: Region, values: Block) -> np.ndarray:
    """float32 [n]: one or more scales, whatever their shape and type."""
    return np.asarray(values.read(whole(values.shape))).astype(np.float32).reshape(-1)[slice(*region[0])]


FORMAT = ScaledFp8()
