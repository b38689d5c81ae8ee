"""AutoAWQ's `gemm` format: 4 bits, groups of in-features, zero points unless the settings say `zero_point: false`.

qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; of word j, nibble i is column 8 j + (0 2 4 6 1 3 5 7)[i].
weight = (code - zero) * scale; without zero points qzeros is left out, or holds 8 throughout.
Facts: docs/format/quantized-layouts.md, sections 6, 10 and 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.derived import derive
from pipeline.tensor.metering import meter
from pipeline.tensor.placement import Region, whole
from pipeline.tensor.tensors import AHEAD_BYTES, Block, LazyTensor
from stages.quantization.auto_round import module_settings
from stages.quantization.columns import rows_of_awq
from stages.quantization.integers import no_offsets
from stages.quantization.packed_format import Modules, PackedFormat, PackedParameter, one_group_a_row
from stages.quantization.sources.gptq import no_groups, no_words

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

_PACKED = ("qweight", "qzeros", "scales")
_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles of a word
_MIDDLES = np.uint32(0x88888888)  # a word of zero points in the middle of the range, 8


class Awq(PackedFormat):
    """AutoAWQ's modules, and AutoRound's that are packed so."""

    name = "awq"
    title = "AWQ"
    keeps = ("W4A16_GPTQ", "W4A16")
    proof = "NVIDIA's converter 0.17, its files byte for byte; AutoRound 0.15, value for value"
    parameters: Mapping[str, PackedParameter] = {
        "qweight": PackedParameter(("in", "out")),
        "qzeros": PackedParameter(("group", "out")),
        "scales": PackedParameter(("group", "out")),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a module's parameters are AWQ's: eight columns of scales for one of words."""
        if not {"qweight", "scales"} <= parameters.keys():
            return False
        shapes = [parameters[name].shape for name in _PACKED if name in parameters]
        return all(len(shape) == 2 for shape in shapes) and 8 * shapes[0][1] == shapes[-1][1]

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
        return problems + self._check_zeros(module, tensors.get("qzeros"), (groups, words), settings)

    def _check_zeros(
        self, module: str, zeros: LazyTensor | None, shape: tuple[int, int], settings: Mapping[str, Any]
    ) -> list[Problem]:
        """Refuse zero points that are missing, of another shape, or there though the settings say that there are none."""
        subject = f"{module}.qzeros"
        if zeros is None:
            said = "zero points, unless the settings say zero_point: false"
            return [Problem(subject, "no such tensor", said)] if self.zero_points(settings) else []
        if zeros.shape != shape:
            return [Problem(subject, f"shape {list(zeros.shape)}", f"{list(shape)}, as the scales have it")]
        if self.zero_points(settings) or np.all(np.asarray(zeros.block(whole(shape))).view(np.uint32) == _MIDDLES):
            return []
        expected = "8 throughout, as the settings say zero_point: false"
        return [Problem(subject, "zero points other than 8", expected, "Set zero_point to true, if the codes were made with them")]

    def module_settings(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """With what AutoRound's `extra_config` says of the module."""
        return module_settings(module, settings)

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        """`codes4`, `scales` and `offsets`; the rest stays."""
        words, scales = parameters["qweight"], parameters["scales"]
        shape = (scales.shape[1], words.shape[0] // 2)
        ahead = AHEAD_BYTES // shape[1]
        codes = derive("unpack", read_codes, {"words": words}, shape=shape, dtype=np.dtype(np.uint8), ahead=ahead)
        like: dict[str, Any] = {"shape": scales.shape, "dtype": np.dtype(np.int16)}
        if "qzeros" in parameters:
            offsets = derive("unpack", read_offsets, {"zeros": parameters["qzeros"]}, **like)
        else:
            offsets = derive("unpack", no_offsets, {"scales": scales}, **like)
        rest = {name: array for name, array in parameters.items() if name not in _PACKED}
        return {"codes4": codes, "scales": scales, "offsets": offsets, **rest}

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        """W4A16_GPTQ, whose kernel takes AWQ's zero points too; W4A16 where every row of all modules is one symmetric group."""

        def offsets(tensors: Mapping[str, LazyTensor]) -> np.ndarray | int:
            if "qzeros" not in tensors:
                return 0
            return read_offsets(((0, 1), (0, tensors["scales"].shape[1])), tensors["qzeros"].block(whole(tensors["qzeros"].shape)))

        if one_group_a_row(modules, "scales", 0) and not any(np.any(offsets(tensors)) for tensors in modules.values()):
            return "W4A16", 0
        first = next(iter(modules.values()))
        return "W4A16_GPTQ", first["qweight"].shape[0] // first["scales"].shape[0]

    def zero_points(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings say so, as they do where they do not say."""
        return settings.get("zero_point") is not False


def read_codes(region: Region, words: Block) -> np.ndarray:
    """uint8 [n, K / 2]: codes of two in-features a byte. Words hold 8 columns."""
    first, last = region[0][0] // 8, -(-region[0][1] // 8)
    rows = rows_of_awq(words, (first, last))[region[0][0] - 8 * first : region[0][1] - 8 * first]
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
