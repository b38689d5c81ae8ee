"""compressed-tensors' integer formats: packed 4- or 8-bit weights (`pack-quantized`), and int8 ones (`int-quantized`).

Packed: weight_packed int32 [N, K / p], p = 32 / bits unsigned codes of consecutive in-features a word, lowest first; weight_scale
[N, G]; weight_shape; asymmetric: weight_zero_point int32 [N / p, G], packed along N. int8: weight [N, K], weight_scale [N, 1].
Facts: docs/format/quantized-layouts.md, sections 9b and 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.packed_format import OF_ALL, Modules, PackedFormat, PackedParameter
from stages.quantization.sources.fp8_scaled import flat
from stages.quantization.sources.gptq import no_words

UINT8, INT16 = np.dtype(np.uint8), np.dtype(np.int16)
_OWN = {"weight_packed", "weight_shape", "weight_zero_point", "weight_scale", "weight_g_idx", "weight"}


class CompressedTensors(PackedFormat):
    """compressed-tensors' modules of integers."""

    name = "compressed-tensors"
    title = "compressed-tensors"
    parameters: Mapping[str, PackedParameter] = {
        "weight_packed": PackedParameter(("out", "in")),
        "weight_scale": PackedParameter(("out", "group")),
        "weight_zero_point": PackedParameter(("out", "group")),
        "weight_g_idx": PackedParameter(("in",)),
        "weight_shape": PackedParameter(("axis",), dropped="the shape is that of the model's configuration"),
        "input_scale": PackedParameter(OF_ALL, becomes="input_scale"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's weight is packed, or int8 with a scale a row."""
        if "weight_scale" not in parameters:
            return False
        return "weight_packed" in parameters or ("weight" in parameters and parameters["weight"].dtype == np.int8)

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse a width other than 4 or 8, shapes that do not fit one another, and groups in an order of their own."""
        scale, weight = tensors["weight_scale"], tensors.get("weight_packed", tensors.get("weight"))
        assert weight is not None, "accepted"
        name = "weight_packed" if "weight_packed" in tensors else "weight"
        if len(weight.shape) != 2:
            return [Problem(f"{module}.{name}", f"shape {list(weight.shape)}", "a matrix")]
        if name == "weight":
            points = tensors.get("weight_zero_point")
            return _check_scale(module, scale, *weight.shape) + _check_zero(module, points)
        if wrong := no_words(module, tensors, ("weight_packed", "weight_zero_point")):
            return wrong
        (rows, words), bits = weight.shape, _bits(settings)
        said = (
            _values(tensors["weight_shape"]).reshape(-1).tolist()
            if "weight_shape" in tensors
            else [rows, words * 32 // max(bits, 1)]
        )
        if bits not in (4, 8) or len(said) != 2 or said[0] != rows or words * 32 != said[1] * bits:
            shape = f"shape [{rows}, {words}] for the weight_shape {said}, num_bits {bits}"
            return [Problem(f"{module}.weight_packed", shape, "4 or 8 bits each")]
        if wrong := _check_scale(module, scale, rows, said[1]):
            return wrong
        groups = scale.shape[1]
        zeros = tensors.get("weight_zero_point")
        if zeros is not None and zeros.shape != (-(-rows * bits // 32), groups):
            expected = f"[{-(-rows * bits // 32)}, {groups}], packed along the rows"
            return [Problem(f"{module}.weight_zero_point", f"shape {list(zeros.shape)}", expected)]
        if zeros is None and _asymmetric(settings):
            return [Problem(f"{module}.weight_zero_point", "no such tensor", "zero points, as the settings say symmetric: false")]
        # Groups of -1 mean none of its own.
        index = _values(tensors["weight_g_idx"]) if "weight_g_idx" in tensors else np.full(1, -1)
        if not np.all(index == -1) and not np.array_equal(index, np.arange(said[1]) // (said[1] // groups)):
            return [Problem(f"{module}.weight_g_idx", "groups in the order of the activations", "consecutive in-features")]
        return []

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`codes4` or `codes8`, `scales` and `offsets`; the rest stays."""
        scales = derive("unpack", transposed, {"values": parameters["weight_scale"]}, shape=parameters["weight_scale"].shape[::-1],
                        dtype=parameters["weight_scale"].dtype)  # fmt: skip
        rest = {name: array for name, array in parameters.items() if name not in _OWN}
        if "input_scale" in rest:
            rest["input_scale"] = derive("unpack", flat, {"values": rest["input_scale"]}, shape=(1,), dtype=np.dtype(np.float32))
        if "weight_packed" not in parameters:
            weight = parameters["weight"]
            codes = derive("unpack", biased, {"values": weight}, shape=weight.shape, dtype=UINT8, rows=weight.chunks[0])
            offsets = derive("unpack", no_offsets, {"scales": scales}, shape=scales.shape, dtype=INT16)
            return {"codes8": codes, "scales": scales, "offsets": offsets, **rest}
        words, bits = parameters["weight_packed"], _bits(settings)
        codes = derive(
            "unpack", as_bytes, {"words": words}, shape=(words.shape[0], 4 * words.shape[1]), dtype=UINT8, rows=words.chunks[0]
        )
        zeros = parameters.get("weight_zero_point")
        if zeros is None:
            offsets = derive("unpack", no_offsets, {"scales": scales}, shape=scales.shape, dtype=INT16)
        else:
            offsets = derive("unpack", read_offsets, {"zeros": zeros}, shape=scales.shape, dtype=INT16, bits=bits)
        return {f"codes{bits}": codes, "scales": scales, "offsets": offsets, **rest}

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:
        """W4A16_GPTQ or W8A16_GPTQ for packed weights, by the first module; nothing for int8 with a scale a row."""
        first, bits = next(iter(modules.values())), _bits(settings)
        if "weight_packed" not in first or bits not in (4, 8):
            return None, 0
        return f"W{bits}A16_GPTQ", first["weight_packed"].shape[1] * 32 // bits // first["weight_scale"].shape[1]


def _check_scale(module: str, scale: LazyTensor, rows: int, features: int) -> list[Problem]:
    if len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] and not features % scale.shape[1]:
        return []
    return [Problem(f"{module}.weight_scale", f"shape {list(scale.shape)}", f"[{rows}, groups of {features}]")]


def _check_zero(module: str, zeros: LazyTensor | None) -> list[Problem]:
    if zeros is None or not np.any(_values(zeros)):
        return []
    return [Problem(f"{module}.weight_zero_point", "zero points of an int8 weight", "none, or zeros")]


def _bits(settings: Mapping[str, Any]) -> int:
    """The width of the weights, as the settings say; 0 where that is no width."""
    groups = settings.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    weights = first.get("weights") if isinstance(first, Mapping) else None
    bits = weights.get("num_bits", 4) if isinstance(weights, Mapping) else 4
    return bits if isinstance(bits, int) and not isinstance(bits, bool) else 0


def _asymmetric(settings: Mapping[str, Any]) -> bool:
    """Whether all that the settings say of weights is that they have zero points."""
    groups = settings.get("config_groups")
    schemes = (
        [scheme.get("weights") for scheme in groups.values() if isinstance(scheme, Mapping)] if isinstance(groups, Mapping) else []
    )
    return bool(schemes) and all(isinstance(weights, Mapping) and weights.get("symmetric") is False for weights in schemes)


def _values(tensor: LazyTensor) -> np.ndarray:
    return np.asarray(tensor.block(whole(tensor.shape)))


def transposed(region: Region, values: Block) -> np.ndarray:
    """[groups, n] of [n, groups]."""
    return np.ascontiguousarray(values.read((region[1], region[0])).T)


def as_bytes(region: Region, words: Block) -> np.ndarray:
    """uint8 [n, K * bits / 8]: words of unsigned codes are the stream of codes already."""
    values = np.ascontiguousarray(words.read((region[0], whole(words.shape)[1])))
    return values.view(np.uint8)[:, slice(*region[1])]


def biased(region: Region, values: Block) -> np.ndarray:
    """uint8 [n, K] of int8: 128 more."""
    signed = values.read(region)
    with meter("unpack", signed.nbytes):
        return signed.view(np.uint8) ^ np.uint8(0x80)


def no_offsets(region: Region, scales: Block) -> np.ndarray:  # noqa: ARG001
    """int16 [groups, n] of zeros: the format is symmetric."""
    return np.zeros([stop - start for start, stop in region], dtype=np.int16)


def read_offsets(region: Region, zeros: Block, bits: int) -> np.ndarray:
    """int16 [groups, n]: 2 ** (bits - 1) less the zero point, of words [N / p, groups] that are packed along N."""
    packed = 32 // bits
    first, last = region[1][0] // packed, -(-region[1][1] // packed)
    words = np.ascontiguousarray(zeros.read(((first, last), region[0]))).view(np.uint32)
    with meter("unpack", words.nbytes):
        stored = np.stack([(words >> (bits * i)) & ((1 << bits) - 1) for i in range(packed)], axis=1)
        stored = stored.reshape(-1, words.shape[1]).T.astype(np.int16)
        result = ((1 << (bits - 1)) - stored).astype(np.int16)
    return np.ascontiguousarray(result[:, region[1][0] - first * packed : region[1][1] - first * packed])


FORMAT = CompressedTensors()
