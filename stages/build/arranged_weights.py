"""The order of a checkpoint's integer weights, held against the GPU and the release of TensorRT-LLM that an engine is built by.

Nothing else would notice: codes in another order are as many, so that the builder succeeds and the engine answers nonsense. Facts:
docs/format/quantized-layouts.md, section 2, and docs/format/runtime-1.2.md, section d.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Problem
from pipeline.model.kernels import alike, generations, stable
from pipeline.model.runtime import runtime
from stages.build.builders import BuilderProbe


@dataclass(frozen=True)
class ArrangedWeights:
    """The weights of a checkpoint, by `algorithm`, are in the order that GPUs of generation `sm` (80 for SM 8.0) read."""

    checkpoint: Path
    algorithm: str
    sm: int

    def problems(self, probed: BuilderProbe) -> list[Problem]:
        """The reasons why that machine would read the weights wrongly: all its GPUs, or its builder, as far as these are known."""
        found, problems = probed.generations, []
        weights = f"the {self.algorithm} weights of {self.checkpoint} are in"
        if found and not set(found) & set(alike(self.sm)):
            others = [f"--sm {sm}" for sm in found if sm in generations()]
            remedy = f"Convert with {' or '.join(others)}, or build on one of these" if others else "Build on one of these"
            expected = f"one of {_listed(alike(self.sm))}, whose order {weights}"
            problems.append(Problem(f"the GPU of {probed.host}", f"generation {_listed(found)}", expected, remedy))
        release = runtime().release
        other = probed.version and not re.match(rf"{re.escape(release)}(?!\d)", probed.version)
        if other and not stable(self.sm):
            expected = f"{release}, whose order for generation {self.sm} {weights}; other releases may read another"
            problems.append(
                Problem(f"TensorRT-LLM on {probed.host}", f"version {probed.version}", expected, f"Build with {release}")
            )
        return problems


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
