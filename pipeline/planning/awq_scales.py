"""Scales of AWQ's search: which targets need them, and what keeps those of a file, or of one calibration, from being theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.model.awq_settings import AwqSettings
from pipeline.model.quantization import AWQ, Quantization
from pipeline.planning.opening import OpenedSource
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import LazyTensor
from stages.read.act_ranges import GROUP_KEY
from stages.read.safetensors import file_metadata
from stages.rename import Renamed

KIND = "awq"  # of what a file has of a module


def searched(quantization: Quantization) -> bool:
    """Whether weights are multiplied by scales that a calibration has searched."""
    return quantization.algorithm == AWQ and quantization.from_numbers


def group_sizes(chosen: Sequence[Quantization]) -> list[int]:
    """The group sizes of the targets that need scales, each once."""
    return list(dict.fromkeys(each.group_size for each in chosen if searched(each)))


def awq_settings(chosen: Sequence[Quantization]) -> AwqSettings | None:
    """The search that a calibration makes for some targets, None for no search. Raises BadInput where they need several."""
    sizes = group_sizes(chosen)
    if len(sizes) > 1:
        found, expected = (
            f"AWQ in groups of {' and of '.join(map(str, sizes))}",
            "groups of one size, as scales are searched for one",
        )
        raise BadInput([Problem("--group_size", found, expected, "Convert them one after the other")])
    return AwqSettings(sizes[0]) if sizes else None


def other_groups(path: Path, chosen: Sequence[Quantization]) -> tuple[Problem, ...]:
    """Targets in groups of another size than the scales of a file were searched for."""
    sizes = group_sizes(chosen)
    said = file_metadata(path).get(GROUP_KEY) if sizes else None
    remedy = f"Give --group_size {said}, or a file for the others"
    return tuple(
        Problem(f"--act_range {path.name}", f"scales for groups of {said}", f"groups of {size}, as the target has them", remedy)
        for size in sizes
        if said and said != str(size)
    )


def apart(
    path: Path,
    wanted: Mapping[tuple[str, str], Mapping[TensorName, Renamed]],
    ranges: Mapping[tuple[str, str], LazyTensor],
    opened: OpenedSource,
) -> tuple[Problem, ...]:
    """Parts of one module whose scales in a file are not the same: its activations have one."""
    first: dict[str, tuple[str, np.ndarray]] = {}
    problems: dict[str, Problem] = {}
    for (module, kind), names in wanted.items():
        for name in names if kind == KIND else ():
            slot = opened.shardings[0].layout.find(name.module)
            if slot and slot.part:
                values = np.asarray(ranges[module, kind].block(whole(ranges[module, kind].shape)))
                whole_module = name.module.rpartition(".")[0]
                other, scale = first.setdefault(whole_module, (module, values))
                if not np.array_equal(scale, values):
                    found, expected = f"other values than {other}|{kind}", "the same, as both take the same activations"
                    remedy = "Give a file as `headrace calibrate` writes it"
                    problem = Problem(f"--act_range {path.name}: {module}|{kind}", found, expected, remedy)
                    problems.setdefault(whole_module, problem)
    return tuple(problems.values())
