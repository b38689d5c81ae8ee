"""The ranges of activations that targets need, of a calibration's file or of one in the same run: beside the source's tensors.

A linear's ranges follow its weight: they get its new name, and the outputs' are taken apart and put in order as its rows are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.model.quantization import FP8, SMOOTHQUANT, Quantization
from pipeline.model.tables import Slot
from pipeline.planning.awq_scales import KIND, apart, awq_settings, group_sizes, other_groups, searched
from pipeline.planning.calibrating import Calibrating, plan_calibrating
from pipeline.planning.compose import target_dtype
from pipeline.planning.job import RANGES
from pipeline.planning.opening import OpenedSource
from pipeline.planning.range_names import of_inputs, of_outputs
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import whole
from pipeline.tensor.source_file import SourceFile
from pipeline.tensor.tensors import AWQ_SCALE, X_RANGE, Y_RANGE, LazyTensor
from stages.quantization.modules import linear
from stages.read.act_ranges import PendingRange, no_magnitudes, no_scales, open_ranges
from stages.rename import Renamed

CALIBRATE = "Give --calibration_tokens or --calib_dataset, or make it with: headrace calibrate"
FEW = 3  # problems of one cause that are still said one by one
PARAMETERS = {"x": X_RANGE, "y": Y_RANGE, KIND: AWQ_SCALE}
Wanted = Mapping[tuple[str, str], Mapping[TensorName, Renamed]]  # by the module and the kind of a range, the names that it goes to


@dataclass(frozen=True)
class Measured:
    """A source with the ranges that its targets need, what is wrong with these, and the calibration that measures them first."""

    opened: OpenedSource
    problems: tuple[Problem, ...] = ()
    calibrating: Calibrating | None = None


def measured(opened: OpenedSource, chosen: Sequence[Quantization]) -> Measured:
    """Give a source the ranges that its targets need. Reads those of a file: they are small."""
    job, wanted, problems = opened.job, _wanted(opened, chosen, ()), _other_types(opened, chosen)
    if behind := _behind_norm(opened, chosen):
        return Measured(opened, (*problems, *behind))
    given = [f"--{name} {path}" for name in RANGES if (path := getattr(job, name))]
    if not wanted:
        found = "a target that uses no ranges" if len(chosen) == 1 else "targets that use no ranges"
        expected = "--smoothquant, --use_fp8, int4_awq, --int8_kv_cache or --fp8_kv_cache, where the source has no scales for it"
        remedy = "Leave it out"
        if opened.model.qk_norm and any(each.fp8_kv_cache for each in chosen):
            found = f"an FP8 cache of {opened.source.architecture}, whose cached keys are normed behind k_proj, as no range is"
            remedy = "Leave it out: the cache has the source's scales, or 1"
        return Measured(opened, (*problems, *(Problem(each, found, expected, remedy) for each in given)))
    if not given:
        needs = next((flag for flag, asks in NEEDS.items() if any(map(asks, chosen))), "--int8_kv_cache")
        found = "no --act_range: its scales are made of measured activations"
        sizes = group_sizes(chosen)
        remedy = f"{CALIBRATE}{f' --awq_group_size {sizes[0]}' if sizes else ''}; int8, int4 and --use_fp8_rowwise need none"
        return Measured(opened, (*problems, Problem(needs, found, "--act_range FILE, of a calibration of this model", remedy)))
    try:
        if job.act_range:
            file, ranges = open_ranges(job.act_range)
            wanted = _wanted(opened, chosen, {module for module, _ in ranges})
            problems += other_groups(job.act_range, chosen)
            problems += _wrong(job.act_range, wanted, ranges, opened)
            problems += () if problems else apart(job.act_range, wanted, ranges, opened)
            return Measured(opened, problems) if problems else Measured(_with(opened, wanted, ranges, file))
        return _to_measure(opened, chosen, problems)
    except BadInput as error:
        return Measured(opened, (*problems, *error.problems))


def _to_measure(opened: OpenedSource, chosen: Sequence[Quantization], problems: tuple[Problem, ...]) -> Measured:
    """The source with ranges that are measured when it is converted. Raises BadInput where it cannot be run."""
    calibration = plan_calibrating(opened, awq_settings(chosen))
    model, files = calibration.model, calibration.activations
    modules = {module for layer in range(calibration.layers) for module in model.linears(layer)}
    wanted = _wanted(opened, chosen, modules)
    if lacking := next((module for module, _ in wanted if module not in modules), ""):
        found = f"{opened.source.architecture}, whose {lacking} is no linear of transformers' model"
        expected, remedy = "a model whose linears are transformers'", "Calibrate the Hugging Face model that it was made of"
        return Measured(opened, (*problems, Problem(opened.source.place, found, expected, remedy)))
    pending, needed = dict[tuple[str, str], LazyTensor](), dict[int, list[str]]()
    for (module, kind), names in wanted.items():
        name, renamed = next(iter(names.items()))
        slot = _slot(opened, name)
        assert slot.layer is not None, "of a layer"
        text = f"{module}|{kind}"
        pending[module, kind] = PendingRange(files.ranges_of(slot.layer), text, _size(opened, slot, kind, renamed), slot.layer)
        needed.setdefault(slot.layer, []).append(text)
    if problems:
        return Measured(opened, problems)
    fixed = {layer: tuple(names) for layer, names in needed.items()}
    return Measured(_with(opened, wanted, pending, calibration.samples.file), (), Calibrating(calibration, fixed))


def _with(opened: OpenedSource, wanted: Wanted, ranges: Mapping[tuple[str, str], LazyTensor], file: SourceFile) -> OpenedSource:
    """A source that has ranges among its tensors, of `file` or of what is measured on that."""
    held = {str(TensorName(module, PARAMETERS[kind])): ranges[module, kind] for module, kind in wanted}
    source = replace(opened.source, tensors={**opened.source.tensors, **held}, files=(*opened.source.files, file))
    names = {**opened.matches.names, **{name: renamed for found in wanted.values() for name, renamed in found.items()}}
    return replace(opened, source=source, matches=replace(opened.matches, names=names))


def _smooths(quantization: Quantization) -> bool:
    return quantization.algorithm in SMOOTHQUANT and quantization.from_numbers


def _scales(quantization: Quantization) -> bool:
    """Whether activations get a scale of measured ranges alone."""
    return quantization.algorithm == FP8 and quantization.from_numbers


# What asks for a calibration, by its flag.
NEEDS = {"--smoothquant": _smooths, "--use_fp8": _scales, "--weight_only_precision int4_awq": searched}


def _wanted(opened: OpenedSource, chosen: Sequence[Quantization], known: Collection[str]) -> Wanted:
    """The module and kind of each range that some target needs, with the new names that it goes to.

    `known`: the modules that have ranges; those of the source, where a module is not among them under another name.
    """
    smooth, scales, cache = any(map(_smooths, chosen)), any(map(_scales, chosen)), any(each.int8_kv_cache for each in chosen)
    # An FP8 cache does without, and takes none where a norm stands between k_proj and what is cached.
    given = opened.job.act_range is not None or opened.job.calibrates
    cache = cache or (given and not opened.model.qk_norm and any(each.fp8_kv_cache for each in chosen))
    wanted: dict[tuple[str, str], dict[TensorName, Renamed]] = {}
    scaled = any(map(searched, chosen))
    if not (smooth or scales or cache or scaled):
        return wanted
    for name, slot, renamed in _linears(opened):
        takes = of_inputs(name, slot, renamed, known)
        if smooth or scales:
            wanted.setdefault((takes.source.module, "x"), {})[TensorName(name, X_RANGE)] = takes
        if scaled:
            by_scale = replace(takes, source=TensorName(takes.source.module, AWQ_SCALE))
            wanted.setdefault((takes.source.module, KIND), {})[TensorName(name, AWQ_SCALE)] = by_scale
        if (smooth or (cache and slot.part and slot.part.heads)) and not slot.module.experts:
            gives = of_outputs(name, slot, renamed, known)
            wanted.setdefault((gives.source.module, "y"), {})[TensorName(name, Y_RANGE)] = gives
    return wanted


def _linears(opened: OpenedSource) -> Iterator[tuple[str, Slot, Renamed]]:
    """The linears of the layers by their new names, with where their rows come from."""
    found: dict[str, Renamed] = {}
    for name, renamed in opened.matches.names.items():
        if name.parameter != "bias" and (name.module not in found or renamed.rows):
            found[name.module] = renamed
    for module, renamed in found.items():
        slot = opened.shardings[0].layout.find(module)
        if slot and linear(slot.module):
            yield module, slot, renamed


def _other_types(opened: OpenedSource, chosen: Sequence[Quantization]) -> tuple[Problem, ...]:
    """Targets of SmoothQuant in another type than float16, in which its arithmetic is known."""
    problems = []
    for options, quantization in zip(opened.job.targets, chosen, strict=True):
        dtype = target_dtype(options, opened)
        if _smooths(quantization) and dtype != "float16":
            expected = "float16, in which SmoothQuant smooths and scales weights"
            found = f"{dtype} with {quantization.algorithm}"
            problems.append(Problem(f"--dtype {options.dtype}", found, expected, "Give --dtype float16"))
    return tuple(problems)


def _behind_norm(opened: OpenedSource, chosen: Sequence[Quantization]) -> list[Problem]:
    """The problem of an INT8 cache whose keys are normed behind k_proj: no range of them is measured, and its scale needs one."""
    if not opened.model.qk_norm or not any(each.int8_kv_cache for each in chosen):
        return []
    found = f"{opened.source.architecture}, whose cached keys are normed behind k_proj"
    expected = "a model that caches what k_proj gives, as ranges are measured there"
    return [Problem("--int8_kv_cache", found, expected, "Leave it out, or give --fp8_kv_cache, which needs no ranges")]


def _slot(opened: OpenedSource, name: TensorName) -> Slot:
    slot = opened.shardings[0].layout.find(name.module)
    assert slot is not None, name
    return slot


def _size(opened: OpenedSource, slot: Slot, kind: str, renamed: Renamed) -> int:
    """The number of a range's channels, by the model's configuration."""
    if kind == "y" and renamed.rows:
        return renamed.total
    return opened.model.dimension(slot.out if kind == "y" else slot.module.in_)


def _wrong(
    path: Path,
    wanted: Wanted,
    ranges: Mapping[tuple[str, str], LazyTensor],
    opened: OpenedSource,
) -> tuple[Problem, ...]:
    """Ranges that are missing, of another shape or type, or no magnitudes: each cause once, with the first that it is true of."""
    causes: dict[str, list[Problem]] = {}
    for (module, kind), names in wanted.items():
        subject, tensor = f"--act_range {path.name}: {module}|{kind}", ranges.get((module, kind))
        name, renamed = next(iter(names.items()))
        size = _size(opened, _slot(opened, name), kind, renamed)
        if tensor is None:
            remedy = CALIBRATE + (" --awq_group_size" if kind == KIND else "")
            problem = Problem(subject, "no such tensor", f"float32 [{size}]", remedy)
            causes.setdefault("missing", []).append(problem)
        elif tuple(tensor.shape) != (size,) or tensor.dtype != np.float32:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            expected = f"float32 [{size}] by the model's configuration"
            causes.setdefault("shape", []).append(Problem(subject, found, expected, "Give the file that was made of this model"))
        elif found := (no_scales if kind == KIND else no_magnitudes)(np.asarray(tensor.block(whole(tensor.shape)))):
            expected = "a factor for each channel" if kind == KIND else "the largest magnitude of each channel"
            causes.setdefault(found, []).append(Problem(subject, found, expected, CALIBRATE))
    return tuple(problem for problems in causes.values() for problem in _few(problems))


def _few(problems: Sequence[Problem]) -> list[Problem]:
    if len(problems) <= FEW:
        return list(problems)
    return [replace(problems[0], found=f"{problems[0].found}, and the like in {len(problems) - 1} more tensors")]
