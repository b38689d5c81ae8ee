"""Fit a target to what TensorRT-LLM's classes compute: adapt the quantization where that helps, and refuse what would be another
model.

A list of excluded modules keeps those in 16 bits whose quantized form lacks what the model computes, and those that a source whose
codes are kept has as numbers in every layer.

Facts: docs/format/runtime-1.2.md, by the table of `configs/runtime/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import Problem
from pipeline.model.computes import Conflict, conflicts, features
from pipeline.model.quantization import Quantization
from pipeline.model.runtime import runtime
from pipeline.planning.compose import target_dtype
from pipeline.planning.opening import OpenedSource
from pipeline.planning.target_options import TargetOptions
from pipeline.planning.targets import config_values
from stages.quantization.modules import linear
from stages.shard import Sharding

RELEASE = f"TensorRT-LLM {runtime().release}"


def fit(opened: OpenedSource, chosen: Sequence[Quantization]) -> tuple[Quantization, ...]:
    """Return the quantizations of all targets, with the modules excluded that are to stay in 16 bits."""
    return tuple(_fitted(opened, *each) for each in zip(opened.job.targets, opened.shardings, chosen, strict=True))


def check_runtime(opened: OpenedSource, chosen: Sequence[Quantization]) -> tuple[list[Problem], tuple[str, ...]]:
    """Return the problems of targets that TensorRT-LLM would compute otherwise, each once, and notes of what is kept regardless."""
    problems: list[Problem] = []
    notes: list[str] = []
    for options, sharding, quantization in zip(opened.job.targets, opened.shardings, chosen, strict=True):
        for conflict in conflicts(_config(opened, options, sharding, quantization)):
            if opened.job.rope_scaling == "keep" and conflict.key.startswith("rotary_scaling"):
                notes.append(f"--rope_scaling keep: {conflict.found} is written, where {RELEASE} asks for {conflict.expected}")
            else:
                problems.append(_problem(conflict, opened, options))
        if quantization.exclude:
            left = ", ".join(name for name in quantization.exclude if name not in runtime().always_plain)
            why = "which the source has as numbers in every layer"
            if quantization.algorithm in runtime().attention:
                left, why = ", ".join(quantization.exclude), "whose quantized form lacks what the model computes"
            notes.append(f"{quantization.algorithm}: in 16 bits stay {left}, {why}")
    return list(dict.fromkeys(problems)), tuple(dict.fromkeys(notes))


def _fitted(opened: OpenedSource, options: TargetOptions, sharding: Sharding, quantization: Quantization) -> Quantization:
    variant = runtime().attention.get(quantization.algorithm or "")
    if variant is None:
        plain = _plain(opened, sharding, quantization)
        return replace(quantization, exclude=(*runtime().always_plain, *plain)) if plain else quantization
    lacking = set(features(_config(opened, options, sharding, quantization))) & set(variant.lacks)
    return replace(quantization, exclude=variant.exclude) if lacking else quantization


def _plain(opened: OpenedSource, sharding: Sharding, quantization: Quantization) -> tuple[str, ...]:
    """The patterns of modules that a source whose codes are kept has as numbers in every layer, where a list may name them."""
    may_be = runtime().may_be_plain.get(quantization.algorithm or "", ())
    if quantization.from_numbers or not may_be:
        return ()
    packed: dict[str, set[bool]] = {}
    for name, renamed in opened.matches.names.items():
        slot = sharding.layout.find(name.module)
        if slot and linear(slot.module) and not slot.module.experts:
            packed.setdefault(slot.module.name, set()).add(renamed.source.module in opened.packing.formats)
    plain = [name for name, kinds in packed.items() if kinds == {False}]
    return tuple(f"*{end}" for end in may_be if any(name.endswith(f".{end}") for name in plain))


def _config(opened: OpenedSource, options: TargetOptions, sharding: Sharding, quantization: Quantization) -> Mapping[str, Any]:
    """The config.json that would be written, with its model's defaults for what a template leaves to the loader."""
    return config_values(opened, options, sharding, quantization, target_dtype(options, opened))


def _problem(conflict: Conflict, opened: OpenedSource, options: TargetOptions) -> Problem:
    """A conflict as a problem of the option or of the source's key that it comes from."""
    head, _, rest = conflict.key.partition(".")
    subjects = {
        "mapping": f"--pp_size {options.pp_size}",
        "quantization": "quantization",
        "head_size": f"{opened.source.config_name}: head_dim",
        "hidden_act": f"{opened.source.config_name}: {' or '.join(opened.family.keys('hidden_act'))}",
        "rotary_scaling": f"{opened.source.config_name}: rope_scaling{f'.{rest}' if rest else ''}",
        "position_embedding_type": f"{opened.source.config_name}: rope_scaling",
        "runtime_defaults": f"{opened.source.config_name}: sliding_window",
    }
    if rest == "group_size" and options.group_size:
        subjects[head] = f"--group_size {options.group_size}"
    return Problem(subjects[head], conflict.found, conflict.expected, conflict.remedy)
