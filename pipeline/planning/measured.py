"""The ranges of activations and scales that targets need, from the file of a calibration: taken in beside the source's tensors.

A linear's ranges follow its weight: they get its new name, and the outputs' are taken apart and put in order as its rows are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput, Problem
from pipeline.model.family_rows import RenameRow
from pipeline.model.quantization import AWQ, FP8, SMOOTHQUANT, Quantization
from pipeline.model.tables import Slot
from pipeline.planning.compose import target_dtype
from pipeline.planning.opening import OpenedSource
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import AWQ_SCALE, X_RANGE, Y_RANGE, LazyTensor
from stages.quantization.modules import linear
from stages.read.act_ranges import GROUP_KEY, open_ranges
from stages.read.safetensors import file_metadata
from stages.rename import Renamed

CALIBRATE = "Make it with `headrace calibrate"
FEW = 3  # problems of one cause that are still said one by one
PARAMETERS = {"x": X_RANGE, "y": Y_RANGE, "awq": AWQ_SCALE}
LARGEST_SCALE = 2.0**14  # whose inverse float16 holds, as it does that of its inverse


def measured(opened: OpenedSource, chosen: Sequence[Quantization]) -> tuple[OpenedSource, list[Problem]]:
    """The source with the ranges that its targets need, and what is wrong with these. Reads them: they are small."""
    path, wanted = opened.job.act_range, _wanted(opened, chosen)
    problems = [*_other_types(opened, chosen), *_experts(opened, chosen)]
    if not wanted:
        found = "a target that uses no ranges" if len(chosen) == 1 else "targets that use no ranges"
        expected = "--smoothquant, --use_fp8, int4_awq, --int8_kv_cache or --fp8_kv_cache, where the source has no scales for it"
        return opened, [*problems, *([Problem(f"--act_range {path}", found, expected, "Leave it out")] if path else [])]
    if path is None:
        needs = next((flag for flag, asks in NEEDS.items() if any(map(asks, chosen))), "--int8_kv_cache")
        found = "no --act_range: its scales are made of measured activations"
        make = f"{CALIBRATE} --awq_group_size {_group(chosen)}`" if needs.endswith("awq") else f"{CALIBRATE}`"
        remedy = f"{make}; int8, int4 and --use_fp8_rowwise need none"
        return opened, [*problems, Problem(needs, found, "--act_range FILE, of a calibration of this model", remedy)]
    try:
        file, ranges = open_ranges(path)
    except BadInput as error:
        return opened, [*problems, *error.problems]
    problems += [*_wrong(path, wanted, ranges, opened), *_other_groups(path, chosen)]
    problems += [] if problems else _apart(path, wanted, ranges, opened)
    if problems:
        return opened, problems
    held = {str(TensorName(module, PARAMETERS[kind])): ranges[module, kind] for module, kind in wanted}
    source = replace(opened.source, tensors={**opened.source.tensors, **held}, files=(*opened.source.files, file))
    names = {**opened.matches.names, **{name: renamed for found in wanted.values() for name, renamed in found.items()}}
    return replace(opened, source=source, matches=replace(opened.matches, names=names)), []


def _smooths(quantization: Quantization) -> bool:
    return quantization.algorithm in SMOOTHQUANT and quantization.from_numbers


def _scales(quantization: Quantization) -> bool:
    """Whether activations get a scale of measured ranges alone."""
    return quantization.algorithm == FP8 and quantization.from_numbers


def _searched(quantization: Quantization) -> bool:
    """Whether weights are multiplied by scales that a calibration has searched."""
    return quantization.algorithm == AWQ and quantization.from_numbers


# What asks for a file, by its flag.
NEEDS = {"--smoothquant": _smooths, "--use_fp8": _scales, "--weight_only_precision int4_awq": _searched}


def _group(chosen: Sequence[Quantization]) -> int:
    """The group size of the targets in AWQ, of the first of them."""
    return next(each.group_size for each in chosen if _searched(each))


def _wanted(opened: OpenedSource, chosen: Sequence[Quantization]) -> dict[tuple[str, str], dict[TensorName, Renamed]]:
    """The source's module and kind of each range that some target needs, with the new names that it goes to."""
    smooth, scales, cache = any(map(_smooths, chosen)), any(map(_scales, chosen)), any(each.int8_kv_cache for each in chosen)
    # An FP8 cache does without.
    cache = cache or (opened.job.act_range is not None and any(each.fp8_kv_cache for each in chosen))
    wanted: dict[tuple[str, str], dict[TensorName, Renamed]] = {}
    searched = any(map(_searched, chosen))
    if not (smooth or scales or cache or searched):
        return wanted
    for name, slot, renamed in _linears(opened):
        module, kept = renamed.source.module, RenameRow(renamed.row.to)
        if smooth or scales:
            of_inputs = Renamed(TensorName(module, X_RANGE), kept)
            wanted.setdefault((module, "x"), {})[TensorName(name, X_RANGE)] = of_inputs
        if searched:
            of_weights = Renamed(TensorName(module, AWQ_SCALE), kept)
            wanted.setdefault((module, "awq"), {})[TensorName(name, AWQ_SCALE)] = of_weights
        if smooth or (cache and slot.part and slot.part.heads):
            of_outputs = replace(renamed, source=TensorName(module, Y_RANGE), axis=0)
            wanted.setdefault((module, "y"), {})[TensorName(name, Y_RANGE)] = of_outputs
    return wanted


def _linears(opened: OpenedSource) -> Iterator[tuple[str, Slot, Renamed]]:
    """The linears of the layers by their new names, with where their rows come from: experts have no ranges."""
    found: dict[str, Renamed] = {}
    for name, renamed in opened.matches.names.items():
        if name.parameter != "bias" and (name.module not in found or renamed.rows):
            found[name.module] = renamed
    for module, renamed in found.items():
        slot = opened.shardings[0].layout.find(module)
        if slot and linear(slot.module) and not slot.module.experts:
            yield module, slot, renamed


def _other_types(opened: OpenedSource, chosen: Sequence[Quantization]) -> Iterator[Problem]:
    """Targets of SmoothQuant in another type than float16, in which its arithmetic is known."""
    for options, quantization in zip(opened.job.targets, chosen, strict=True):
        dtype = target_dtype(options, opened)
        if _smooths(quantization) and dtype != "float16":
            expected = "float16, in which SmoothQuant smooths and scales weights"
            yield Problem(f"--dtype {options.dtype}", f"{dtype} with {quantization.algorithm}", expected, "Give --dtype float16")


def _experts(opened: OpenedSource, chosen: Sequence[Quantization]) -> Iterator[Problem]:
    """Mixtures in FP8 with one scale: a calibration does not measure experts."""
    if opened.model.num_experts and any(map(_scales, chosen)):
        found = f"{opened.model.num_experts} experts a layer, whose activations a calibration does not measure"
        yield Problem("--use_fp8", found, "a model without experts, or one that is quantized so", "Give --quantization int8")


def _other_groups(path: Path, chosen: Sequence[Quantization]) -> Iterator[Problem]:
    """Targets in AWQ in groups of another size than the file's scales were searched for."""
    sizes = dict.fromkeys(each.group_size for each in chosen if _searched(each))
    said = file_metadata(path).get(GROUP_KEY) if sizes else None
    for size in sizes:
        if said and said != str(size):
            found, expected = f"scales for groups of {said}", f"groups of {size}, as the target has them"
            yield Problem(f"--act_range {path.name}", found, expected, f"Give --group_size {said}, or a file for the others")


def _apart(
    path: Path,
    wanted: Mapping[tuple[str, str], Mapping[TensorName, Renamed]],
    ranges: Mapping[tuple[str, str], LazyTensor],
    opened: OpenedSource,
) -> Iterator[Problem]:
    """Queries, keys and values whose scales are not the same, as they are one module, whose activations have one."""
    first: dict[str, tuple[str, np.ndarray]] = {}
    for (module, kind), names in wanted.items():
        for name in names if kind == "awq" else ():
            slot = opened.shardings[0].layout.find(name.module)
            if slot and slot.part:
                values = np.asarray(ranges[module, kind].block(whole(ranges[module, kind].shape)))
                other, scale = first.setdefault(name.module.rpartition(".")[0], (module, values))
                if not np.array_equal(scale, values):
                    found, expected = f"other values than {other}|{kind}", "the same, as both take the same activations"
                    yield Problem(f"--act_range {path.name}: {module}|{kind}", found, expected, f"{CALIBRATE}`")


def _wrong(
    path: Path,
    wanted: Mapping[tuple[str, str], Mapping[TensorName, Renamed]],
    ranges: Mapping[tuple[str, str], LazyTensor],
    opened: OpenedSource,
) -> list[Problem]:
    """Ranges that are missing, of another shape or type, or no magnitudes: each cause once, with the first that it is true of."""
    causes: dict[str, list[Problem]] = {}
    model = opened.model
    for (module, kind), names in wanted.items():
        subject, tensor = f"--act_range {path.name}: {module}|{kind}", ranges.get((module, kind))
        name, renamed = next(iter(names.items()))
        slot = opened.shardings[0].layout.find(name.module)
        assert slot is not None, name
        size = model.dimension(slot.module.in_) if kind != "y" else renamed.total if renamed.rows else model.dimension(slot.out)
        if tensor is None:
            problem = Problem(
                subject, "no such tensor", f"float32 [{size}]", f"{CALIBRATE}{' --awq_group_size' * (kind == 'awq')}`"
            )
            causes.setdefault("missing", []).append(problem)
        elif tuple(tensor.shape) != (size,) or tensor.dtype != np.float32:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            expected = f"float32 [{size}] by the model's configuration"
            causes.setdefault("shape", []).append(Problem(subject, found, expected, "Give the file that was made of this model"))
        elif found := (_no_scales if kind == "awq" else _no_magnitudes)(np.asarray(tensor.block(whole(tensor.shape)))):
            expected = "a factor for each channel" if kind == "awq" else "the largest magnitude of each channel"
            causes.setdefault(found, []).append(Problem(subject, found, expected, f"{CALIBRATE}`"))
    return [problem for problems in causes.values() for problem in _few(problems)]


def _few(problems: Sequence[Problem]) -> list[Problem]:
    if len(problems) <= FEW:
        return list(problems)
    return [replace(problems[0], found=f"{problems[0].found}, and the like in {len(problems) - 1} more tensors")]


def _no_magnitudes(values: np.ndarray) -> str:
    """Why values are no largest magnitudes; "" where they are."""
    if not np.isfinite(values).all():
        return "a value that is not finite (NaN or infinity)"
    if (values < 0).any():
        return "a value below 0"
    return "" if values.any() else "nothing but zeros, of which no scale can be made"


def _no_scales(values: np.ndarray) -> str:
    """Why values are no scales of AWQ's; "" where they are."""
    if not np.isfinite(values).all():
        return "a value that is not finite (NaN or infinity)"
    if (values <= 0).any():
        return "a value that is not above 0"
    wide = (values > LARGEST_SCALE).any() or (values < 1 / LARGEST_SCALE).any()
    return f"a value outside 1/{LARGEST_SCALE:.0f} to {LARGEST_SCALE:.0f}, whose inverse float16 does not hold" if wide else ""
