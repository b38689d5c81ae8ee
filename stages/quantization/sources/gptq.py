"""GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it: 2 to 8 bits, groups of in-features, symmetric or not.

qweight int32 [K * bits / 32, N], codes of consecutive in-features one after the other, lowest bits first (of 3 bits over the ends
of words); qzeros int32 [G, N * bits / 32]; scales [G, N]; g_idx int32 [K], the group of each in-feature. weight = (code - zero -
1) * scale; format v2, the planar one (gptq_p) and some of AutoRound's store the zero itself. Codes of 2 and 3 bits are codes of 4
bits, too, and those of 5 to 7 bits codes of 8: with the same middle they are the same weights.
Facts: docs/format/quantized-layouts.md, sections 5, 5b, 9c and 11.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import AHEAD_BYTES, Block, LazyTensor
from stages.quantization import auto_round, dynamic
from stages.quantization.auto_round import activation_bits, stores_the_zero
from stages.quantization.bit_planes import BLOCK, from_planes, planar
from stages.quantization.columns import rows_of_words
from stages.quantization.kernels.dispatch import kernels
from stages.quantization.packed_format import Modules, PackedFormat, PackedParameter, one_group_a_row, wide_activations

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_PACKED = ("qweight", "qzeros", "scales")
UINT8, INT16 = np.dtype(np.uint8), np.dtype(np.int16)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Gptq(PackedFormat):
    """GPTQ's modules."""

    name = "gptq"
    title = "GPTQ"
    keeps = ("W4A16_GPTQ", "W8A16_GPTQ", "W4A16", "W8A16")
    proof = "NVIDIA's converter 0.17, its files byte for byte (4 and 8 bits); GPTQModel 7.6, AutoRound 0.15, value for value"
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
        if bits not in WIDTHS or settings.get("bits", bits) != bits:
            named = f", and bits {settings['bits']} in the settings" if "bits" in settings else ""
            return [Problem(subject, f"{bits:g} bits by its shape{named}", "2 to 8 bits, alike")]
        features, groups = tensors["qweight"].shape[0] * 32 // int(bits), scales.shape[0]
        if features * int(bits) != tensors["qweight"].shape[0] * 32 or features % 2:
            return [Problem(subject, f"{tensors['qweight'].shape[0]} words of in-features", f"whole codes of {bits:g} bits")]
        if planar(settings, bits) and (features % BLOCK or scales.shape[1] % BLOCK):
            expected = f"multiples of {BLOCK}, of {bits:g} bits in planes"
            return [Problem(subject, f"{features} in-features, {scales.shape[1]} out-features", expected)]
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

    def module_settings(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """With what AutoRound's `extra_config` or GPTQModel's `dynamic` says of the module."""
        return dynamic.module_settings(module, auto_round.module_settings(module, settings))

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
        """`codes4` (of 2 and 3 bits, too) or `codes8` (of 5 to 7, too), `scales`, `offsets`, and `group_index` if there is one."""
        words, zeros, scales = (parameters[name] for name in _PACKED)
        bits = int(_bits(zeros.shape[-1], scales.shape[-1]))
        features = words.shape[0] * 32 // bits
        second = stores_the_zero(settings)
        width, planes = _width(bits), planar(settings, bits)
        shape = (words.shape[1], features * width // 8)
        like: dict[str, Any] = {"shape": shape, "dtype": UINT8, "ahead": AHEAD_BYTES // shape[1]}
        if bits == width:
            codes = derive("unpack", read_codes, {"words": words}, **like)
        else:
            codes = derive("unpack", read_few_bits, {"words": words}, **like, bits=bits, planes=planes)
        arguments: dict[str, Any] = {"bits": bits, "symmetric": _symmetric(settings), "second": second, "planes": planes}
        offsets = derive("unpack", read_offsets, {"zeros": zeros}, shape=scales.shape, dtype=INT16, **arguments)
        rest = {name: array for name, array in parameters.items() if name not in (*_PACKED, "g_idx")}
        index = {"group_index": parameters["g_idx"]} if "g_idx" in parameters else {}
        return {f"codes{width}": codes, "scales": scales, "offsets": offsets, **index, **rest}

    def act_order(self, tensors: Mapping[str, LazyTensor]) -> bool:
        """Whether a module's groups are not consecutive in-features (`desc_act`): then it can only be dequantized."""
        index, groups = _index(tensors), tensors["scales"].shape[0]
        return not np.array_equal(index, np.arange(index.size) // max(index.size // groups, 1))

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:
        """W4A16_GPTQ (of 2 and 3 bits, too) or W8A16_GPTQ (of 5 to 7), by most modules; W4A16 or W8A16 where a row is one symmetric
        group.

        Settings that say `sym` are believed: quantizing finds out where a zero point says otherwise.
        """
        # Where single modules have other widths or groups, these are what does not fit.
        (bits, group), _ = Counter(map(_width_and_group, modules.values())).most_common(1)[0]
        if one_group_a_row(modules, "scales", 0) and (settings.get("sym") is True or not _shifted(modules, settings)):
            return f"W{bits}A16", 0
        return f"W{bits}A16_GPTQ", group

    def notes(self, settings: Mapping[str, Any], algorithm: str) -> list[str]:
        """That activations which AutoRound quantized for are left as they are."""
        bits = activation_bits(settings)
        return [wide_activations(f"{bits} bits", algorithm)] if bits < 16 else []


def _width_and_group(tensors: Mapping[str, LazyTensor]) -> tuple[int, int]:
    """The width of a module's codes as a target would have them, and the in-features of a group."""
    words, zeros, scales = (tensors[name].shape for name in _PACKED)
    bits = 32 * zeros[-1] // scales[-1]
    return _width(bits), words[0] * 32 // bits // scales[0]


def _symmetric(settings: Mapping[str, Any]) -> bool:
    """Whether zero points are in the middle of the range, as the settings say, or do not say."""
    return settings.get("sym") is not False


def _shifted(modules: Modules, settings: Mapping[str, Any]) -> bool:
    """Whether a module of one group a row has a zero point that is not in the middle of the range. Reads them."""
    second = stores_the_zero(settings)
    for tensors in modules.values():
        stored, columns = tensors["qzeros"], tensors["scales"].shape[1]
        bits, block = int(_bits(stored.shape[1], columns)), stored.block(whole(stored.shape))
        if np.any(read_offsets(((0, 1), (0, columns)), block, bits, _symmetric(settings), second, planar(settings, bits))):
            return True
    return False


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
    return rows_of_words(words, region[0]).view(np.uint8)[:, slice(*region[1])]


def read_few_bits(region: Region, words: Block, bits: int, planes: bool) -> np.ndarray:
    """uint8 [n, K / 2] of codes of 2 or 3 bits, as codes of 4 bits with the same middle; [n, K] of 5 to 7 bits, as those of 8.
    `planes`: words are in planes.
    """
    values = words.read((whole(words.shape)[0], region[0]))
    with meter("unpack", values.nbytes):
        stream, width = kernels().transposed(values), _width(bits)
        codes = from_planes(stream, bits) if planes else unpacked(stream, bits)
        codes += np.uint8((1 << (width - 1)) - (1 << (bits - 1)))
        if width == 8:
            return codes[:, slice(*region[1])]
        return np.asarray(codes[:, 0::2] | codes[:, 1::2] << 4)[:, slice(*region[1])]


def read_offsets(region: Region, zeros: Block, bits: int, symmetric: bool, second: bool, planes: bool = False) -> np.ndarray:
    """int16 [groups, n]: 2 ** (bits - 1) less the zero point. `planes`: words are in planes.

    Some files of the first format hold zero points of the second. A symmetric one is in the middle of the range: where all of a
    module's are stored as the middle itself, they can only be the second's.
    """
    # Codes begin where a word does every `packed` columns, which take `count` words.
    packed, count = (BLOCK, bits) if planes else (32 // math.gcd(32, bits), bits // math.gcd(32, bits))
    first, last = region[1][0] // packed, min(-(-region[1][1] // packed), zeros.shape[1] // count)
    words = np.ascontiguousarray(zeros.read((region[0], (first * count, last * count))))
    everything = np.ascontiguousarray(zeros.read(whole(zeros.shape))) if symmetric and not second else words
    with meter("unpack", words.nbytes):
        middle = 1 << (bits - 1)
        if symmetric and not second:
            second = bool(np.all(unpacked(everything, bits) == middle))
        codes = from_planes(words, bits) if planes else unpacked(words, bits)
        result = (middle - codes.astype(np.int16) - (0 if second else 1)).astype(np.int16)
    return result[:, region[1][0] - first * packed : region[1][1] - first * packed]


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] to uint8 [..., n * 32 / bits], lowest bits first."""
    data = words.view(np.uint8)
    if bits == 8:
        return data
    if bits in (2, 3):
        # 8 codes of 3 bits are 3 bytes, 4 of 2 bits are one.
        count, size = (8, 3) if bits == 3 else (4, 1)
        runs = data.reshape(*data.shape[:-1], -1, size).astype(np.uint32)
        joined = sum((runs[..., n] << (8 * n) for n in range(1, size)), start=runs[..., 0])
        codes = np.empty((*joined.shape, count), dtype=np.uint8)
        for n in range(count):
            codes[..., n] = (joined >> (bits * n)) & ((1 << bits) - 1)
        return codes.reshape(*data.shape[:-1], -1)
    result = np.empty((*data.shape[:-1], data.shape[-1] * 2), dtype=np.uint8)
    result[..., 0::2], result[..., 1::2] = data & 15, data >> 4
    return result


def _index(tensors: Mapping[str, LazyTensor]) -> np.ndarray:
    """The group of each in-feature, where a module says it; nothing where it does not."""
    return np.asarray(tensors["g_idx"].block(whole(tensors["g_idx"].shape))) if "g_idx" in tensors else np.empty(0, dtype=np.int32)


def _width(bits: int) -> int:
    """The width of the codes that a target has of those of `bits` bits."""
    return 4 if bits <= 4 else 8


def _bits(words: int, columns: int) -> float:
    """How many bits a code has where `columns` of them take `words` words of 32 bits."""
    return 32 * words / max(columns, 1)


FORMAT = Gptq()
