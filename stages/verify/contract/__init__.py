"""contract: every tensor that TensorRT-LLM 1.2.1's loader asks for, rank by rank, told from config.json alone.

Nothing here knows how headrace plans or writes: names, shapes and types come from the checkpoint format as it is described
(checkpoint format, families, quantized layouts), and a config.json of any version from 0.13 on is understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem
from stages.verify.contract.expected import Expected, Form
from stages.verify.contract.modules import stage, unaligned
from stages.verify.contract.settings import read_settings

__all__ = ["Expected", "Form", "contract"]


def contract(config: Mapping[str, Any]) -> tuple[list[Mapping[str, Expected]], list[Problem]]:
    """What each rank's file must hold, rank 0 first, by tensor name; and what is wrong with config.json.

    No ranks where config.json does not say what their shapes are. Never raises, whatever the values are.
    """
    settings, problems = read_settings(config)
    if settings is None:
        return [], problems
    stages = [stage(settings, number) for number in range(settings.parallel.pp)]
    ranks: list[Mapping[str, Expected]] = [tensors for tensors in stages for _ in range(settings.parallel.tp)]
    return ranks, [*problems, *unaligned(settings)]
