"""contract: every tensor that TensorRT-LLM 1.2.1's loader asks for, rank by rank, derived from config.json alone.

What the loader's classes would compute otherwise than the model is wrong, by the table that planning refuses by
(`pipeline.model.computes`). Nothing else here knows how headrace plans or writes: names, shapes and types follow the descriptions
of the format (docs/format/checkpoint.md, docs/format/families.md and docs/format/quantized-layouts.md). A config.json of any
version from 0.13 on is understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.model.computes import conflicts
from stages.verify.contract.expected import ExpectedTensor, TensorForm
from stages.verify.contract.modules import stage_tensors, unaligned_matrices
from stages.verify.contract.settings import read_settings

__all__ = ["ExpectedTensor", "TensorForm", "contract"]


def contract(config: Mapping[str, Any]) -> tuple[list[Mapping[str, ExpectedTensor]], list[Problem]]:
    """Derive the tensors that each rank's file must hold, and list what is wrong with config.json.

    Returns a mapping of tensor names for each rank, rank 0 first, and the problems. Where config.json does not tell the shapes,
    there are no ranks. Never raises, whatever the values are.
    """
    settings, problems = read_settings(config)
    if settings is None:
        return [], problems
    stages = [stage_tensors(settings, number) for number in range(settings.parallel.pp)]
    ranks: list[Mapping[str, ExpectedTensor]] = [tensors for tensors in stages for _ in range(settings.parallel.tp)]
    computed = (Problem(f"config.json: {each.key}", each.found, each.expected, each.remedy) for each in conflicts(config))
    return ranks, [*problems, *computed, *unaligned_matrices(settings)]
