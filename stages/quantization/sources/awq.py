"""AutoAWQ's `gemm` format: 4 bits, groups of in-features, zero points.

qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; of word j, nibble i is column 8 j + (0 2 4 6 1 3 5 7)[i].
weight = (code - zero) * scale. Facts: docs/format/quantized-layouts.md, section 6.
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
from pipeline.tensor.tensors import AHEAD_BYTES, Block, LazyTensor
from stages.quantization.packed_format import Modules, PackedFormat, PackedParameter
from stages.quantization.sources.gptq import no_groups, no_words

_PACKED = ("qweight", "qzeros", "scales")
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word
_LOW = np.uint32(0x0F0F0F0F)


class Awq(PackedFormat):
    """AutoAWQ's modules."""

    name = "awq"
    title = "AWQ"
    parameters: Mapping[str, PackedParameter] = {
        "qweight": PackedParameter(("in", "out")),
        "qzeros": PackedParameter(("group", "out")),
        "scales": PackedParameter(("group", "out")),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's parameters are AWQ's: eight columns of scales for one of words."""
        shapes = [parameters[name].shape for name in _PACKED if name in parameters]
        return [len(shape) for shape in shapes] == [2, 2, 2] and 8 * shapes[0][1] == shapes[2][1]

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:
        """Refuse another width or version of the format, and shapes that do not fit one another."""
        problems = no_words(module, tensors, ("qweight", "qzeros"))
        if settings.get("bits", settings.get("w_bit", 4)) != 4:
            problems.append(Problem(f"{module}.qweight", f"bits {settings.get('bits', settings.get('w_bit'))}", "4"))
        if str(settings.get("version", "gemm")).lower() != "gemm":
            problems.append(Problem(f"{module}.qweight", f"version {settings['version']}", "gemm", "Export the model as gemm"))
        (features, words), groups = tensors["qweight"].shape, tensors["scales"].shape[0]
        if features % 2:
            problems.append(Problem(f"{module}.qweight", f"{features} in-features", "an even number of them"))
        problems += no_groups(module, features, groups, settings.get("group_size", settings.get("q_group_size")))
        if tensors["qzeros"].shape != (groups, words):
            expected = f"[{groups}, {words}], as the scales have it"
            problems.append(Problem(f"{module}.qzeros", f"shape {list(tensors['qzeros'].shape)}", expected))
        return problems

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`codes4`, `scales` and `offsets`; the rest stays."""
        words, zeros, scales = (parameters[name] for name in _PACKED)
        shape = (scales.shape[1], words.shape[0] // 2)
        ahead = AHEAD_BYTES // shape[1]
        codes = derive("unpack", read_codes, {"words": words}, shape=shape, dtype=np.dtype(np.uint8), ahead=ahead)
        offsets = derive("unpack", read_offsets, {"zeros": zeros}, shape=scales.shape, dtype=np.dtype(np.int16))
        rest = {name: array for name, array in parameters.items() if name not in _PACKED}
        return {"codes4": codes, "scales": scales, "offsets": offsets, **rest}

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """W4A16_GPTQ, whose kernel takes AWQ's zero points too."""
        first = next(iter(modules.values()))
        return "W4A16_GPTQ", first["qweight"].shape[0] // first["scales"].shape[0]


def read_codes(region: Region, words: Block) -> np.ndarray:
    """uint8 [n, K / 2]: codes of two in-features a byte. Words of 8 columns are taken apart two in-features at a time."""
    first, last = region[0][0] // 8, -(-region[0][1] // 8)
    values = words.read((whole(words.shape)[0], (first, last))).view(np.uint32)
    with meter("unpack", values.nbytes):
        even, odd = values[0::2], values[1::2]
        low = (even & _LOW) | ((odd & _LOW) << 4)
        high = ((even >> 4) & _LOW) | (odd & ~_LOW)
        result = np.empty((last - first, 8, even.shape[0]), dtype=np.uint8)
        # Byte b of `low` is nibble 2 b of the word, of `high` nibble 2 b + 1.
        for b in range(4):
            result[:, _COLUMNS[2 * b], :] = low.view(np.uint8)[:, b::4].T
            result[:, _COLUMNS[2 * b + 1], :] = high.view(np.uint8)[:, b::4].T
    rows = result.reshape(-1, even.shape[0])[region[0][0] - 8 * first : region[0][1] - 8 * first]
    return rows[:, slice(*region[1])]


def read_offsets(region: Region, zeros: Block) -> np.ndarray:
    """int16 [groups, n]: 8 less the zero point."""
    first, last = region[1][0] // 8, -(-region[1][1] // 8)
    words = np.ascontiguousarray(zeros.read((region[0], (first, last)))).view(np.uint32)
    with meter("unpack", words.nbytes):
        result = np.empty((*words.shape, 8), dtype=np.int16)
        for i, column in enumerate(_COLUMNS):
            result[..., column] = 8 - ((words >> (4 * i)) & 15).astype(np.int16)
    return result.reshape(words.shape[0], -1)[:, region[1][0] - 8 * first : region[1][1] - 8 * first]


FORMAT = Awq()
