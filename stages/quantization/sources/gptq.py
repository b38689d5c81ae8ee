"""GPTQ, as AutoGPTQ and GPTQModel write it: 4 or 8 bits, groups of in-features, symmetric or not.

qweight int32 [K / p, N], p = 32 / bits codes of consecutive in-features a word, lowest first; qzeros int32 [G, N / p]; scales [G,
N]; g_idx int32 [K], the group of each in-feature. weight = (code - zero - 1) * scale; format v2 stores the zero itself.
Facts: docs/format/quantized-layouts.md, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import AHEAD_BYTES, Block, LazyTensor
from stages.quantization.packed_format import Modules, PackedFormat, PackedParameter

_PACKED = ("qweight", "qzeros", "scales")
UINT8, INT16 = np.dtype(np.uint8), np.dtype(np.int16)


class Gptq(PackedFormat):
    """GPTQ's modules."""

    name = "gptq"
    title = "GPTQ"
    parameters: Mapping[str, PackedParameter] = {
        "qweight": PackedParameter(("in", "out")),
        "qzeros": PackedParameter(("group", "out")),
        "scales": PackedParameter(("group", "out")),
        "g_idx": PackedParameter(("in",), becomes="group_index"),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's parameters are GPTQ's: as many columns of words as of scales."""
        shapes = [parameters[name].shape for name in _PACKED if name in parameters]
        return [len(shape) for shape in shapes] == [2, 2, 2] and shapes[0][1] == shapes[2][1]

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse other widths, shapes that do not fit one another, and groups that are missing or that the scales do not have."""
        zeros, scales = tensors["qzeros"], tensors["scales"]
        if wrong := no_words(module, tensors, ("qweight", "qzeros")):
            return wrong
        bits = _bits(zeros.shape[1], scales.shape[1])
        subject = f"{module}.qweight"
        if bits not in (4, 8) or settings.get("bits", bits) != bits:
            named = f", and bits {settings['bits']} in the settings" if "bits" in settings else ""
            return [Problem(subject, f"{bits:g} bits by its shape{named}", "4 or 8 bits, alike")]
        features, groups = tensors["qweight"].shape[0] * 32 // int(bits), scales.shape[0]
        if wrong := no_groups(module, features, groups, settings.get("group_size")):
            return wrong
        if zeros.shape[0] != groups:
            expected = f"[{groups}, {zeros.shape[1]}], as the scales have it"
            return [Problem(f"{module}.qzeros", f"shape {list(zeros.shape)}", expected)]
        if settings.get("desc_act") is True and "g_idx" not in tensors and groups > 1:
            expected = "the group of each in-feature, as the settings say desc_act: true"
            return [Problem(f"{module}.g_idx", "no such tensor", expected)]
        index = _index(tensors)
        outside = index[(index < 0) | (index >= groups)]
        if outside.size:
            return [Problem(f"{module}.g_idx", f"group {outside[0]}", f"the groups 0 to {groups - 1} of the scales")]
        return []

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`codes4` or `codes8`, `scales` and `offsets`, and `group_index` where the source has one; the rest stays."""
        words, zeros, scales = (parameters[name] for name in _PACKED)
        bits = int(_bits(zeros.shape[-1], scales.shape[-1]))
        features = words.shape[0] * 32 // bits
        symmetric = bool(settings.get("sym", False))
        second = settings.get("checkpoint_format") == "gptq_v2"
        shape = (words.shape[1], features * bits // 8)
        codes = derive("unpack", read_codes, {"words": words}, shape=shape, dtype=UINT8, ahead=AHEAD_BYTES // shape[1])
        arguments: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "second": second}
        offsets = derive("unpack", read_offsets, {"zeros": zeros}, shape=scales.shape, dtype=INT16, **arguments)
        rest = {name: array for name, array in parameters.items() if name not in (*_PACKED, "g_idx")}
        index = {"group_index": parameters["g_idx"]} if "g_idx" in parameters else {}
        return {f"codes{bits}": codes, "scales": scales, "offsets": offsets, **index, **rest}

    def act_order(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether a module's groups are not consecutive in-features (`desc_act`): then it can only be dequantized."""
        index, groups = _index(tensors), tensors["scales"].shape[0]
        return not np.array_equal(index, np.arange(index.size) // max(index.size // groups, 1))

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """W4A16_GPTQ or W8A16_GPTQ, by the first module."""
        words, zeros, scales = (next(iter(modules.values()))[name].shape for name in _PACKED)
        bits = 32 * zeros[-1] // scales[-1]
        return f"W{bits}A16_GPTQ", words[0] * 32 // bits // scales[0]


def no_words(module: str, tensors: Mapping[str, LazyTensor], names: Sequence[str]) -> list[Problem]:
    """Which of a module's packed tensors are not of 32-bit words."""
    return [
        Problem(f"{module}.{name}", f"values of type {tensors[name].dtype}", "words of 32 bits")
        for name in names
        if name in tensors and tensors[name].dtype not in (np.dtype(np.int32), np.dtype(np.uint32))
    ]


def no_groups(module: str, features: int, groups: int, size: Any) -> list[Problem]:
    """Refuse a number of groups that does not divide the in-features evenly, or not into groups of the settings' size."""
    said = size if isinstance(size, int) and size > 0 else 0
    if groups and features and not features % groups and said * groups in (0, features):
        return []
    expected = f"groups of {said}" if said else "groups of one size"
    return [Problem(f"{module}.scales", f"{groups} groups of {features} in-features", expected)]


def read_codes(region: Region, words: Block) -> np.ndarray:
    """uint8 [n, K * bits / 8]: a word holds consecutive in-features, lowest first, so that transposed words are the stream of
    codes.
    """
    values = words.read((whole(words.shape)[0], region[0]))
    with meter("unpack", values.nbytes):
        stream = np.ascontiguousarray(values.T).view(np.uint8)
    return stream[:, slice(*region[1])]


def read_offsets(region: Region, zeros: Block, bits: int, symmetric: bool, second: bool) -> np.ndarray:
    """int16 [groups, n]: 2 ** (bits - 1) less the zero point.

    Some files of the first format hold zero points of the second. A symmetric one is in the middle of the range: where all of a
    module's are stored as the middle itself, they can only be the second's.
    """
    packed = 32 // bits
    first, last = region[1][0] // packed, -(-region[1][1] // packed)
    words = np.ascontiguousarray(zeros.read((region[0], (first, last))))
    everything = np.ascontiguousarray(zeros.read(whole(zeros.shape))) if symmetric and not second else words
    with meter("unpack", words.nbytes):
        middle = 1 << (bits - 1)
        if symmetric and not second:
            second = bool(np.all(unpacked(everything, bits) == middle))
        result = (middle - unpacked(words, bits).astype(np.int16) - (0 if second else 1)).astype(np.int16)
    return result[:, region[1][0] - first * packed : region[1][1] - first * packed]


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] to uint8 [..., n * 32 / bits], lowest bits first."""
    data = words.view(np.uint8)
    if bits == 8:
        return data
    result = np.empty((*data.shape[:-1], data.shape[-1] * 2), dtype=np.uint8)
    result[..., 0::2], result[..., 1::2] = data & 15, data >> 4
    return result


def _index(tensors: Mapping[str, LazyTensor]) -> np.ndarray:
    """The group of each in-feature, where a module says it; nothing where it does not."""
    return np.asarray(tensors["g_idx"].block(whole(tensors["g_idx"].shape))) if "g_idx" in tensors else np.empty(0, dtype=np.int32)


def _bits(words: int, columns: int) -> float:
    """How many bits a code has where `columns` of them take `words` words of 32 bits."""
    return 32 * words / max(columns, 1)


FORMAT = Gptq()
