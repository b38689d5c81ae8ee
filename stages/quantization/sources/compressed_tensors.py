"""compressed-tensors' integer formats: packed 4- or 8-bit weights (`pack-quantized`), and int8 ones (`int-quantized`).

Packed: weight_packed int32 [N, K / p], p = 32 / bits unsigned codes of consecutive in-features a word, lowest first;
weight_shape. int8: weight [N, K], signed; also codes of 4 bits, one a byte. Both: weight_scale [N, G], [N, 1] or one;
asymmetric: weight_zero_point int32 [N / p, G], packed along N, or int8 [N, G], signed. weight_g_idx int32 [K]: the group of each
in-feature; -1 throughout: consecutive ones. Facts: docs/format/quantized-layouts.md, sections 9b and 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.model.quantization import SQ_OF_CODES
from pipeline.tensor.derived import derive
from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import LazyTensor
from stages.quantization.compressed_settings import (
    OWN_BITS,
    asymmetric,
    bits_of,
    group_counts,
    nibbles,
    quantized_activations,
    widths,
)
from stages.quantization.integers import as_bytes, biased, by_group, in_pairs, no_offsets, read_index, read_offsets, signed_offsets
from stages.quantization.packed_format import OF_ALL, Modules, PackedFormat, PackedParameter, wide_activations
from stages.quantization.sources.fp8_scaled import flat
from stages.quantization.sources.gptq import no_words

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

INT8, UINT8, INT16, INT32 = (np.dtype(kind) for kind in (np.int8, np.uint8, np.int16, np.int32))
_OWN = {"weight_packed", "weight_shape", "weight_zero_point", "weight_scale", "weight_g_idx", "weight"}


class CompressedTensors(PackedFormat):
    """compressed-tensors' modules of integers."""

    name = "compressed-tensors"
    title = "compressed-tensors"
    keeps = ("W4A16_GPTQ", "W8A16_GPTQ", "W4A16", "W8A16", SQ_OF_CODES)
    proof = "compressed-tensors 0.19 (checkpoints of llm-compressor 0.14), value for value"
    parameters: Mapping[str, PackedParameter] = {
        "weight_packed": PackedParameter(("out", "in")),
        "weight_scale": PackedParameter(("out", "group")),
        "weight_zero_point": PackedParameter(("out", "group")),
        "weight_g_idx": PackedParameter(("in",), becomes="group_index"),
        "weight_shape": PackedParameter(("axis",), dropped="the shape is that of the model's configuration"),
        "input_scale": PackedParameter(OF_ALL, becomes="input_scale"),
        "input_zero_point": PackedParameter(OF_ALL, dropped="activations are not quantized to integers"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is packed in words, or int8 with a scale a row."""
        if "weight_scale" not in parameters:
            return False
        if "weight_packed" in parameters:
            return bool(parameters["weight_packed"].dtype != np.uint8)  # small floats, which are of other formats
        return "weight" in parameters and parameters["weight"].dtype == np.int8

    def module_settings(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """With `num_bits` of a packed weight whose shape says another width than the first scheme, where some scheme has it."""
        if not {"weight_packed", "weight_shape"} <= tensors.keys() or len(set(widths(settings))) < 2:
            return settings
        said, shape = _values(tensors["weight_shape"]).reshape(-1), tensors["weight_packed"].shape
        fits = [bits for bits in widths(settings) if len(said) == 2 and len(shape) == 2 and 32 * shape[1] == bits * said[1]]
        return {**settings, OWN_BITS: fits[0]} if fits and fits[0] != widths(settings)[0] else settings

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse a width other than 4 or 8, and shapes that do not fit one another."""
        scale, weight = tensors["weight_scale"], tensors.get("weight_packed", tensors.get("weight"))
        assert weight is not None, "accepted"
        name = "weight_packed" if "weight_packed" in tensors else "weight"
        if len(weight.shape) != 2:
            return [Problem(f"{module}.{name}", f"shape {list(weight.shape)}", "a matrix")]
        zeros = tensors.get("weight_zero_point")
        (rows, features), bits = weight.shape, bits_of(settings)
        if name == "weight_packed":
            packed = [name] if zeros is None or zeros.dtype == INT8 else [name, "weight_zero_point"]
            if wrong := no_words(module, tensors, packed):
                return wrong
            said = [rows, features * 32 // max(bits, 1)]
            if "weight_shape" in tensors:
                said = _values(tensors["weight_shape"]).reshape(-1).tolist()
            if bits not in (4, 8) or len(said) != 2 or said[0] != rows or features * 32 != said[1] * bits:
                shape = f"shape [{rows}, {features}] for the weight_shape {said}, num_bits {bits}"
                remedy = "" if bits in (4, 8) else "Convert the model that it was quantized from"
                return [Problem(f"{module}.weight_packed", shape, "4 or 8 bits each", remedy)]
            features = said[1]
        elif zeros is not None and zeros.dtype != INT8:
            return [Problem(f"{module}.weight_zero_point", f"values of type {zeros.dtype}", "int8, as the weight's")]
        if wrong := _check_scale(module, scale, rows, features, group_counts(settings, features)):
            return wrong
        if zeros is None and asymmetric(settings):
            return [Problem(f"{module}.weight_zero_point", "no such tensor", "zero points, as the settings say symmetric: false")]
        return [*_check_zeros(module, zeros, scale, rows, bits), *_check_index(module, tensors, features, _groups(scale.shape))]

    def heights(self, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, int]:
        """The rows of a word of zero points."""
        zeros = tensors.get("weight_zero_point")
        return {} if zeros is None or zeros.dtype == INT8 else {"weight_zero_point": 32 // bits_of(settings)}

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`codes4` or `codes8`, `scales` and `offsets`, and `group_index` where the source has one; the rest stays."""
        result = {name: array for name, array in parameters.items() if name not in _OWN}
        result.pop("input_zero_point", None)
        if "input_scale" in result:
            result["input_scale"] = derive(
                "unpack", flat, {"values": result["input_scale"]}, shape=(1,), dtype=np.dtype(np.float32)
            )
        codes, bits = self._codes(parameters, settings)
        rows, scale = codes.shape[0], parameters["weight_scale"]
        shape = (_groups(scale.shape), rows)
        scales = derive("unpack", by_group, {"values": scale}, shape=shape, dtype=scale.dtype)
        zeros, index = parameters.get("weight_zero_point"), parameters.get("weight_g_idx")
        if zeros is None:
            offsets = derive("unpack", no_offsets, {"scales": scales}, shape=shape, dtype=INT16)
        elif zeros.dtype == INT8:
            offsets = derive("unpack", signed_offsets, {"zeros": zeros}, shape=shape, dtype=INT16)
        else:
            offsets = derive("unpack", read_offsets, {"zeros": zeros}, shape=shape, dtype=INT16, bits=bits)
        result |= {f"codes{bits}": codes, "scales": scales, "offsets": offsets}
        if index is not None:
            arguments: dict[str, Any] = {"groups": shape[0]}
            result["group_index"] = derive("unpack", read_index, {"index": index}, shape=index.shape, dtype=INT32, **arguments)
        return result

    def _codes(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> tuple[BlockArray, int]:
        """The canonical codes of a module, and their width."""
        if "weight_packed" in parameters:
            words = parameters["weight_packed"]
            shape = (words.shape[0], 4 * words.shape[1])
            return derive("unpack", as_bytes, {"words": words}, shape=shape, dtype=UINT8, rows=words.chunks[0]), bits_of(settings)
        weight = parameters["weight"]
        (rows, features), chunks = weight.shape, weight.chunks[0]
        if nibbles(settings) and not features % 2:
            return derive("unpack", in_pairs, {"values": weight}, shape=(rows, features // 2), dtype=UINT8, rows=chunks), 4
        return derive("unpack", biased, {"values": weight}, shape=weight.shape, dtype=UINT8, rows=chunks), 8

    def act_order(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether a module's groups are not consecutive in-features (`actorder: group`): then it can only be dequantized."""
        if "weight_g_idx" not in tensors:
            return False
        index = _values(tensors["weight_g_idx"])
        groups = _groups(tensors["weight_scale"].shape)
        return not np.all(index == -1) and not np.array_equal(index, np.arange(index.size) // max(index.size // groups, 1))

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:
        """W4A16_GPTQ or W8A16_GPTQ, by the first module; W4A16 or W8A16 where every row of all modules is one symmetric group."""
        # Where rows have one group in some modules alone, the others say the group's size.
        groups = {module: _groups(tensors["weight_scale"].shape) for module, tensors in modules.items()}
        module = next((name for name, count in groups.items() if count > 1), next(iter(groups)))
        first = modules[module]
        packed = first.get("weight_packed")
        bits = bits_of(self.module_settings(module, first, settings)) if packed is not None else 4 if nibbles(settings) else 8
        if bits not in (4, 8):
            return None, 0
        if groups[module] == 1 and not any(_shifted(tensors, bits) for tensors in modules.values()):
            return f"W{bits}A16", 0
        features = packed.shape[1] * 32 // bits if packed is not None else first["weight"].shape[1]
        return f"W{bits}A16_GPTQ", features // groups[module]

    def notes(self, settings: Mapping[str, Any], algorithm: str) -> list[str]:
        """That activations which the source's kernels quantize are left as they are, or quantized as there without smoothing."""
        quantized = quantized_activations(settings)
        if algorithm == SQ_OF_CODES:
            return [f"{algorithm} of the source's own codes: activations are quantized by token, and nothing is smoothed"]
        return [wide_activations(quantized, algorithm)] if quantized else []


def _groups(scale: tuple[int, ...]) -> int:
    """Into how many groups of in-features a row is divided, by the shape of the scales."""
    return math.prod(scale[1:])


def _check_scale(module: str, scale: LazyTensor, rows: int, features: int, said: set[int]) -> list[Problem]:
    """Refuse scales that are not those of the rows, or of other groups than the settings say (`said`: their numbers)."""
    shape = scale.shape
    by_row = bool(shape) and shape[0] == rows and len(shape) <= 2 and bool(shape[-1]) and not features % _groups(shape)
    if (by_row or math.prod(shape) == 1) and (not said or _groups(shape) in said):
        return []
    groups = f"{' or '.join(map(str, sorted(said)))} groups of {features}" if said else f"groups of {features}"
    return [Problem(f"{module}.weight_scale", f"shape {list(shape)}", f"[{rows}, {groups}]")]


def _check_zeros(module: str, zeros: LazyTensor | None, scale: LazyTensor, rows: int, bits: int) -> list[Problem]:
    """Refuse zero points that are not those of the scales."""
    if zeros is None:
        return []
    words = -(-rows * bits // 32)
    groups = _groups(scale.shape)
    if zeros.dtype == INT8:
        # One a row, or for all, may have an axis of groups or not; of several a row their number does not say where each lies.
        alike = [shape for shape in ((), (1,), (1, 1), (rows,), (rows, 1)) if math.prod(shape) == math.prod(scale.shape)]
        expected, right = f"{list(scale.shape)}, as the scales", zeros.shape in (scale.shape, *alike)
    else:
        expected, right = f"[{words}, {groups}], packed along the rows", zeros.shape == (words, groups)
    return [] if right else [Problem(f"{module}.weight_zero_point", f"shape {list(zeros.shape)}", expected)]


def _check_index(module: str, tensors: Mapping[str, LazyTensor], features: int, groups: int) -> list[Problem]:
    """Refuse a list of groups that is not of all in-features, or names a group that the scales do not have."""
    if "weight_g_idx" not in tensors:
        return []
    index = _values(tensors["weight_g_idx"])
    if index.shape != (features,):
        return [Problem(f"{module}.weight_g_idx", f"shape {list(index.shape)}", f"[{features}]")]
    outside = index[(index < 0) | (index >= groups)]
    if not outside.size or np.all(index == -1):
        return []
    return [Problem(f"{module}.weight_g_idx", f"group {outside[0]}", f"the groups 0 to {groups - 1} of the scales")]


def _shifted(tensors: Mapping[str, LazyTensor], bits: int) -> bool:
    """Whether a module has a zero point that is not in the middle of the range. Reads them."""
    zeros = tensors.get("weight_zero_point")
    if zeros is None:
        return False
    if zeros.dtype == INT8:
        return bool(np.any(_values(zeros)))
    rows = tensors["weight_packed"].shape[0]
    return bool(np.any(read_offsets(((0, zeros.shape[1]), (0, rows)), zeros.block(whole(zeros.shape)), bits=bits)))


def _values(tensor: LazyTensor) -> np.ndarray:
    return np.asarray(tensor.block(whole(tensor.shape)))


FORMAT = CompressedTensors()
