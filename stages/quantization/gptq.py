"""GPTQ, as AutoGPTQ and GPTQModel write it: 4 or 8 bits, groups of in-features, symmetric or not.

qweight int32 [K / p, N], p = 32 / bits codes of consecutive in-features a word, lowest first; qzeros int32 [G, N / p]; scales [G,
N]; g_idx int32 [K], the group of each in-feature. weight = (code - zero - 1) * scale; format v2 stores the zero itself.
Facts: quantized layouts, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.derived import derive
from pipeline.errors import Problem
from pipeline.metering import meter
from pipeline.placement import Region, whole
from pipeline.tensors import Block, LazyTensor

if TYPE_CHECKING:
    import dask.array as da

NAME = "gptq"
_PACKED = ("qweight", "qzeros", "scales")
UINT8, INT16 = np.dtype(np.uint8), np.dtype(np.int16)


def accepts(parameters: Mapping[str, Any]) -> bool:
    """Whether a module's parameters are GPTQ's: as many columns of words as of scales."""
    return set(_PACKED) <= parameters.keys() and parameters["qweight"].shape[-1] == parameters["scales"].shape[-1]


def check(module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
    """What of a module cannot be unpacked, or only by dequantizing: other widths, groups that follow the activations."""
    zeros, scales = tensors["qzeros"], tensors["scales"]
    bits = _bits(zeros.shape[-1], scales.shape[-1])
    subject = f"{module}.qweight"
    if bits not in (4, 8) or settings.get("bits", bits) != bits:
        named = f", and bits {settings['bits']} in the settings" if "bits" in settings else ""
        return [Problem(subject, f"{bits:g} bits by its shape{named}", "4 or 8 bits, alike")]
    features, groups = tensors["qweight"].shape[-2] * 32 // int(bits), scales.shape[-2]
    size = settings.get("group_size", -1)
    if groups == 0 or features % groups or (size > 0 and size * groups != features):
        return [Problem(f"{module}.scales", f"{groups} groups of {features} in-features", f"groups of {size}")]
    return []


def act_order(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a module's groups are not consecutive in-features (`desc_act`): then it can only be dequantized."""
    if "g_idx" not in tensors:
        return False
    index = np.asarray(tensors["g_idx"].block(whole(tensors["g_idx"].shape)))
    groups = tensors["scales"].shape[-2]
    return not np.array_equal(index, np.arange(index.size) // max(index.size // max(groups, 1), 1))


def unpack(parameters: Mapping[str, da.Array], settings: Mapping[str, Any]) -> dict[str, da.Array]:
    """`codes4` or `codes8`, `scales` and `offsets`, and `group_index` where the source has one; the rest stays."""
    words, zeros, scales = (parameters[name] for name in _PACKED)
    bits = int(_bits(zeros.shape[-1], scales.shape[-1]))
    features = words.shape[0] * 32 // bits
    symmetric = bool(settings.get("sym", False))
    second = settings.get("checkpoint_format") == "gptq_v2"
    codes = derive("unpack", read_codes, {"words": words}, shape=(words.shape[1], features * bits // 8), dtype=UINT8)
    arguments: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "second": second}
    offsets = derive("unpack", read_offsets, {"zeros": zeros}, shape=scales.shape, dtype=INT16, **arguments)
    rest = {name: array for name, array in parameters.items() if name not in (*_PACKED, "g_idx")}
    index = {"group_index": parameters["g_idx"]} if "g_idx" in parameters else {}
    return {f"codes{bits}": codes, "scales": scales, "offsets": offsets, **index, **rest}


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

    Some files of the first format hold zero points of the second. A symmetric one is in the middle of the range: stored as the
    middle itself, it can only be the second's.
    """
    packed = 32 // bits
    first, last = region[1][0] // packed, -(-region[1][1] // packed)
    words = zeros.read((region[0], (first, last)))
    with meter("unpack", words.nbytes):
        stored = unpacked(np.ascontiguousarray(words), bits)
        middle = 1 << (bits - 1)
        if symmetric and stored.size and np.all(stored == middle):
            second = True
        result = (middle - stored.astype(np.int16) - (0 if second else 1)).astype(np.int16)
    return result[:, region[1][0] - first * packed : region[1][1] - first * packed]


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] to uint8 [..., n * 32 / bits], lowest bits first."""
    data = words.view(np.uint8)
    if bits == 8:
        return data
    result = np.empty((*data.shape[:-1], data.shape[-1] * 2), dtype=np.uint8)
    result[..., 0::2], result[..., 1::2] = data & 15, data >> 4
    return result


def _bits(words: int, columns: int) -> float:
    """How many bits a code has where `columns` of them take `words` words of 32 bits."""
    return 32 * words / max(columns, 1)
