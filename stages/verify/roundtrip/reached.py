"""Scales that are measured of numbers: the largest value of those that share a scale has the largest code.

What rounding may do to a value grows with its scale, so that a scale which is many times too large would let zeros pass for all
values. Facts: docs/format/quantized-layouts.md, sections 4c and 4d.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from pipeline.errors import Problem
from stages.verify.matrices import Matrix
from stages.verify.roundtrip.figures import Figures
from stages.verify.roundtrip.origin import Origin
from stages.verify.values import to_float32

# The largest code of each kind of matrix whose scale is not of each row or group alone, and the parameter that holds the scale.
MEASURED = {"fp8": (448.0, "weights_scaling_factor"), "smoothquant": (127.0, "per_channel_scale")}
ENOUGH = 0.85  # of the largest code: the next float8 below is 0.93 of it, and a rounded scale moves an integer by less than one
# A kind of matrix, and what has a scale in common: all of one scale in a layer, or of one name in a tensor.
Shared = tuple[str, float | str]


def shared_by(matrix: Matrix, origin: Origin) -> Shared:
    """The rows that share a scale with some: those of one value, or in SmoothQuant those of one source of q, k and v, or all."""
    if matrix.kind == "fp8":  # the modules of a layer may have one in common
        return matrix.kind, float(matrix.scales(0, 1)[0, 0])
    return matrix.kind, origin.source if origin.module.endswith(".qkv") else ""


def largest_code(matrix: Matrix, data: np.ndarray) -> float:
    """The largest magnitude of some codes, as a part of the largest that there is. `data`: uint8 [rows, in_features]."""
    signed = data.view(np.int8)
    if matrix.kind == "smoothquant":
        return max(int(signed.max()), -int(signed.min())) / 127
    # Floats of one sign order as their bytes do; of signed bytes the positive are above, of unsigned ones the negative.
    byte = max(int(signed.max()), int(data.max()) & 0x7F)
    largest = to_float32(np.array([min(byte, 0x7E)], np.uint8).view(ml_dtypes.float8_e4m3fn))
    return float(largest[0]) / 448


def unused_codes(figures: Mapping[tuple[int, str], Figures], names: Mapping[tuple[int, str], str]) -> Iterator[Problem]:
    """Report the scales by which no value has a large code, where all values are as right as the scales let them be.

    `names`: of the ranks' tensors in the whole model.
    """
    reached: dict[tuple[str, Shared], float] = defaultdict(float)
    for place, each in figures.items():
        for shared, part in each.reached.items():
            group = _group(names[place], shared)
            reached[group] = max(reached[group], part if each.first is None else 1.0)
    for (rank, tensor), each in sorted(figures.items()):
        parts = [(reached[_group(names[rank, tensor], shared)], shared) for shared in each.reached]
        part, (kind, scale) = min(parts, default=(1.0, ("", "")))
        if part < ENOUGH:
            most, parameter = MEASURED[kind]
            subject = f"rank{rank}.safetensors: {tensor.rpartition('.')[0]}.{parameter}"
            found = f"{f'{scale:.7g}' if isinstance(scale, float) else 'scales'}, by which no code is above {part * most:.4g}"
            yield Problem(subject, found, f"one by which the largest value of the source has the code {most:g}")


def _group(name: str, shared: Shared) -> tuple[str, Shared]:
    """The tensors that have a scale in common in the whole model: those of one layer, or one of all ranks."""
    return (".".join(name.split(".")[:3]) if isinstance(shared[1], float) else name), shared
