"""Toy: a code of 4 bits a byte, in-features first, and a step for each group of in-features.

levels uint8 [in, out]; steps float16 [groups, out]. weight = (level - 8) * step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import Problem
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.derived import derive
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Block, LazyTensor
from stages.quantization.packed_format import Modules, PackedFormat, PackedParameter


class Toy(PackedFormat):
    """Modules with `levels` and `steps`."""

    name = "toy"
    title = "Toy"
    parameters: Mapping[str, PackedParameter] = {
        "levels": PackedParameter(("in", "out")),
        "steps": PackedParameter(("group", "out")),
    }

    def accepts(self, parameters: Mapping[str, Any]) -> bool:
        return {"levels", "steps"} <= parameters.keys()

    def check(self, module: str, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[Problem]:  # noqa: ARG002
        levels, steps = tensors["levels"], tensors["steps"]
        if len(levels.shape) != 2 or levels.shape[0] % 2 or levels.dtype != np.uint8:
            return [Problem(f"{module}.levels", f"{levels.dtype} {list(levels.shape)}", "uint8 [in, out], in even")]
        features, out = levels.shape
        if len(steps.shape) != 2 or steps.shape[1] != out or not steps.shape[0] or features % steps.shape[0]:
            return [Problem(f"{module}.steps", f"shape {list(steps.shape)}", f"[groups of {features}, {out}]")]
        return []

    def unpack(self, parameters: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:  # noqa: ARG002
        levels, steps = parameters["levels"], parameters["steps"]
        features, out = levels.shape
        codes = derive("unpack", read_codes, {"levels": levels}, shape=(out, features // 2), dtype=np.dtype(np.uint8))
        offsets = derive("unpack", read_offsets, {"steps": steps}, shape=steps.shape, dtype=np.dtype(np.int16))
        rest = {name: array for name, array in parameters.items() if name not in self.parameters}
        return {"codes4": codes, "scales": steps, "offsets": offsets, **rest}

    def native(self, modules: Modules, settings: Mapping[str, Any]) -> tuple[str | None, int]:  # noqa: ARG002
        first = next(iter(modules.values()))
        return "W4A16_GPTQ", first["levels"].shape[0] // first["steps"].shape[0]


def read_codes(region: Region, levels: Block) -> np.ndarray:
    """uint8 [n, k / 2]: two in-features a byte, the even one in the low half."""
    rows, (first, last) = region
    values = levels.read(((2 * first, 2 * last), rows))
    return np.ascontiguousarray((values[0::2] | values[1::2] << 4).T)


def read_offsets(region: Region, steps: Block) -> np.ndarray:  # noqa: ARG001
    """int16 [groups, n] of zeros: every zero point is 8."""
    return np.zeros([stop - start for start, stop in region], dtype=np.int16)


FORMAT = Toy()
