"""Checks that source, configuration and target agree, tensor by tensor, before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import Problem
from pipeline.model.dtypes import NUMBERS, of_numpy
from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import Family, Module, Slot
from pipeline.planning.dask_settings import settings_problems
from pipeline.planning.engine_options import job_requests
from pipeline.planning.nvidia_flags import check_expected
from pipeline.tensor.arrays import BlockArray
from pipeline.tensor.names import TensorName, by_module
from pipeline.tensor.placement import pieces, whole
from pipeline.tensor.tensors import MEASURED, LazyTensor, Parameter, Source, TensorMap, plain
from stages.quantization.alignment import alignment
from stages.quantization.kernels.chosen import kernel_problems
from stages.quantization.sources import format_named
from stages.quantize import unfit
from stages.read.wrapped_names import some
from stages.rename import LOST, units
from stages.shard import Sharding, divisibility, embedding_options, tp_sizes

if TYPE_CHECKING:
    from pipeline.model.quantization import Quantization
    from pipeline.planning.choose_algorithm import Packing
    from pipeline.planning.opening import OpenedSource
    from stages.quantization.packed_format import Modules
    from stages.rename import Matches, Renamed

TYPES = {
    "codes4": {"U8"},
    "codes8": {"U8"},
    "offsets": {"I16"},
    "fp8": {"F8_E4M3"},
    "fp4": {"U8"},
    "block_scale": {"F8_E4M3"},
    "group_index": {"I32", "I64"},
}
# Of a module that tied embeddings stand in for.
HEADLESS = (
    "The model without its head, as embedding models are saved, generates no text: save the whole model, fetch the missing shard, "
    "or set tie_word_embeddings to true if the embeddings are its head"
)
MANY = 100  # missing tensors, which are told one by one up to here
MISSING = "Fetch the missing shard, or mend the configuration"
# What a quantized module has beside its codes, and what it may have.
SCHEMES = {
    "codes4": (("scales", "offsets"), ("group_index", "prequant", "input_scale")),
    "codes8": (("scales", "offsets"), ("group_index", "prequant", "input_scale")),
    "fp8": ((), ("channel_scale", "tensor_scale", "input_scale")),
    "fp4": (("block_scale", "global_scale"), ("prequant", "input_scale")),
}


def check_request(opened: OpenedSource) -> list[Problem]:
    """Check the output directories and the options that can be judged without the tensors; returns the problems."""
    problems = [
        *settings_problems(),
        *kernel_problems(),
        *opened.output_problems,
        *_refused_biases(opened),
        *_unfit_options(opened),
        *check_expected(opened),
    ]
    of_shapes = (problem for sharding in opened.shardings for problem in (*divisibility(sharding), *embedding_options(sharding)))
    return [*problems, *dict.fromkeys(of_shapes)]


def check_canonical(opened: OpenedSource, tensors: TensorMap) -> list[Problem]:
    """Check the unpacked tensors: fused rows, names, shapes and types, and that copies of tied weights are equal to them."""
    source, matches = opened.source, opened.matches
    fused = check_fused(source, matches, opened.packing)
    return [*(fused or check_tensors(tensors, matches, opened.shardings[0], opened.family)), *check_ties(source, matches.copies)]


def check_targets(opened: OpenedSource, chosen: Sequence[Quantization], tensors: TensorMap, sound: bool) -> list[Problem]:
    """Check that TensorRT-LLM can load each target: the kind of its codes, and that every share is whole tiles.

    `sound`: the tensors have passed all other checks, so that their values and shares can be looked at.
    """
    problems: list[Problem] = []
    for quantization, sharding in zip(chosen, opened.shardings, strict=True):
        if sound and not problems:
            problems += unfit(tensors, sharding, quantization, opened.matches.origin)
        if sound and not problems:
            problems += alignment(sharding, quantization, tp_sizes(sharding.model, sharding))
    return problems


def _refused_biases(opened: OpenedSource) -> list[Problem]:
    if opened.job.mlp_bias != "refuse":
        return []
    omitted = set(opened.matches.left_out) - set(opened.matches.copies)
    return [Problem(str(name), "a bias of the MLP", "none, as --mlp_bias is refuse") for name in sorted(omitted)]


def _unfit_options(opened: OpenedSource) -> list[Problem]:
    """Options that this source, or another option, has no use for."""
    job, source, problems = opened.job, opened.source, []
    if job.copy_tokenizer and not source.companions:
        expected = "a Hugging Face directory with its tokenizer"
        problems.append(Problem("--copy_tokenizer", f"no tokenizer's files in {source.place}", expected))
    here = opened.workers.apart or ("://" in (job.scratch or "") and "shard" in job.cuts and job.elsewhere)
    if here and job_requests(job.targets, job.engine):
        expected = "rank files that workers write, and see"
        problems.append(
            Problem("[engine]", "rank files that this process assembles", expected, "Run headrace build when they are whole")
        )
    return problems


def parameters(module: Module, model: ModelConfig) -> tuple[str, ...]:
    """The parameters that TensorRT-LLM's loader asks of a module, by config.json alone."""
    if module.when and not getattr(model, module.when):
        return ()
    return ("weight", "bias") if module.bias and getattr(model, module.bias) else ("weight",)


def expected(sharding: Sharding, tensors: Mapping[TensorName, object]) -> Iterator[tuple[TensorName, Slot, str]]:
    """Every tensor that a target needs after unpacking: (name, slot, parameter).

    Experts are asked for one by one, unless their stack is there; a quantized module for its codes and scales.
    """
    model = sharding.model

    def of_module(base: str, slot: Slot, parameter: str) -> Iterator[tuple[TensorName, Slot, str]]:
        codes = next((name for name in SCHEMES if TensorName(base, name) in tensors), "") if parameter == "weight" else ""
        if not codes:
            yield TensorName(base, parameter), slot, parameter
            if TensorName(base, "kv_scale") in tensors and parameter == "weight":
                yield TensorName(base, "kv_scale"), slot, "kv_scale"
            return
        required, optional = SCHEMES[codes]
        for name in (codes, *required, *(name for name in optional if TensorName(base, name) in tensors)):
            yield TensorName(base, name), slot, name

    for module in sharding.layout.modules.values():
        for layer in range(model.num_hidden_layers) if module.in_layer else (None,):
            base = module.name.replace("{layer}", str(layer))
            for part in module.parts or (None,):
                suffix = f".{part.name}" if part else ""
                for parameter in parameters(module, model):
                    if not module.experts or TensorName(f"{base}{suffix}", parameter) in tensors:
                        yield from of_module(f"{base}{suffix}", Slot(module, part, layer, None), parameter)
                        continue
                    for expert in range(model.num_experts):
                        yield from of_module(f"{base}.{expert}{suffix}", Slot(module, part, layer, expert), parameter)


def check_tensors(tensors: TensorMap, matches: Matches, sharding: Sharding, family: Family) -> list[Problem]:
    """Missing tensors, contradicting shapes, parameters that the configuration does not speak of, types that are no weights."""
    problems = []
    wanted = {}
    for name, slot, parameter in expected(sharding, tensors):
        wanted[name] = sharding.shape(slot, _measured(slot, parameter, tensors.get(name), sharding))
        if name not in tensors:
            remedy = HEADLESS if name.module in family.ties else MISSING
            problems.append(Problem(source_name(name, family), "no such tensor", f"shape {list(wanted[name])}", remedy))
    if 2 * len(problems) > len(wanted) and len(problems) > MANY:  # one cause: these are not the files of the model
        names = some([problem.subject for problem in problems])
        found = f"{len(problems)} of {len(wanted)} tensors are not there: {names}"
        problems = [Problem("tensors", found, "all that the model's configuration speaks of", MISSING)]
    for name, array in tensors.items():
        source = str(matches.origin(name))
        if name.parameter in ("kv_scale", *MEASURED):
            continue  # one, of whichever module it is; ranges were looked at where they were opened
        if name not in wanted:
            remedy = LOST
            problems.append(Problem(source, "a tensor that the configuration does not speak of", "none", remedy))
        elif array.shape != wanted[name]:
            problems.append(Problem(source, f"shape {list(array.shape)}", f"{list(wanted[name])} by the model's configuration"))
        elif of_numpy(array.dtype).safetensors not in TYPES.get(name.parameter, NUMBERS):
            found, types = of_numpy(array.dtype).safetensors, ", ".join(sorted(TYPES.get(name.parameter, NUMBERS)))
            problems.append(Problem(source, f"values of type {found}", f"weights of type {types}"))
    return problems


def _measured(slot: Slot, parameter: str, array: BlockArray | None, sharding: Sharding) -> Parameter:
    """A parameter with the group size that its array shows, where it has groups."""
    known = plain(parameter, matrix=bool(slot.module.in_))
    axes = [axis for axis, _ in known.axes]
    if parameter not in ("codes4", "fp4") and "group" not in axes:
        return known
    units = {"in": Fraction(1, 2)} if parameter in ("codes4", "fp4") else {}
    if "group" in axes and array is not None:
        units = {"group": Fraction(array.shape[axes.index("group") - len(axes)], sharding.model.dimension(slot.module.in_))}
    return Parameter(tuple((axis, units.get(axis, unit)) for axis, unit in known.axes))


def check_fused(source: Source, matches: Matches, packing: Packing) -> list[Problem]:
    """A fused source has just the rows of its parts: more would be lost. And no number of it is of two parts."""
    packed = packing.formats
    rows: dict[TensorName, list[Renamed]] = {}
    for renamed in matches.names.values():
        if renamed.rows:
            rows.setdefault(renamed.source, []).append(renamed)
    problems = []
    modules = by_module(source.named) if rows and packed else {}
    for name, parts in rows.items():
        axis, total = parts[0].axis, parts[0].total
        shape = source.named[name].shape
        described = format_named(packed[name.module]).parameters.get(name.parameter) if name.module in packed else None
        rows_each = described.rows if described else 1
        if name.parameter in ("weight", "bias") and (len(shape) <= axis or shape[axis] * rows_each != total):
            problems.append(Problem(str(name), f"shape {list(shape)}", f"{total} rows by the model's configuration"))
        elif any(units(shape, part) == 0 for part in parts) or _rounded_up(name, parts[0], packing, modules):
            expected_ = f"bounds of its {len(parts)} parts, of {total} rows, between values and not inside one"
            problems.append(Problem(str(name), f"shape {list(shape)}", expected_, "Convert the model that it was quantized from"))
    counts = Counter(renamed.source for renamed in matches.names.values())
    for name, count in counts.items():
        known = format_named(packed[name.module]).parameters.get(name.parameter) if count > 1 and name.module in packed else None
        if known and known.joint:
            remedy = "Convert the model that it was quantized from"
            problems.append(Problem(str(name), f"one tensor for {count} parts of a fused module", "one for each part", remedy))
    return problems


def _rounded_up(name: TensorName, part: Renamed, packing: Packing, modules: Modules) -> bool:
    """Whether a parameter's numbers on its axis of rows are of more rows than there are: then a bound of parts is inside one.

    Parts are of one size but for queries, so that a tile that the end cuts is one that a bound cuts, too.
    """
    shape = modules[name.module][name.parameter].shape if name.module in packing.formats else ()
    if len(shape) <= part.axis or shape[part.axis] == 1:
        return False
    settings = packing.own.get(name.module, packing.settings)
    heights = format_named(packing.formats[name.module]).heights(modules[name.module], settings)
    return shape[part.axis] * heights.get(name.parameter, 0) > part.total


def check_ties(source: Source, copies: Mapping[TensorName, TensorName]) -> list[Problem]:
    """Tied embeddings that come with a second copy: it must be one. Read a piece at a time."""
    problems = []
    for copy, original in copies.items():
        a, b = source.named[copy], source.named[original]
        numbers = {of_numpy(a.dtype).safetensors, of_numpy(b.dtype).safetensors} <= NUMBERS
        if a.shape != b.shape or not (numbers or a.dtype == b.dtype) or not all(_equal_pieces(a, b)):
            expected_ = f"a copy of {original}"
            remedy = "Set tie_word_embeddings to false if the model has a head of its own, or leave the copy out"
            problems.append(Problem(str(copy), "other values, though the configuration says tied", expected_, remedy))
    return problems


def _equal_pieces(a: LazyTensor, b: LazyTensor) -> Iterator[bool]:
    """Yield, piece by piece, whether two tensors of one shape are equal: in their bytes, or in their values where types differ."""
    for piece in pieces(whole(a.shape), max(a.dtype.itemsize, b.dtype.itemsize), 8 << 20):
        left, right = np.asarray(a.block(piece)), np.asarray(b.block(piece))
        if a.dtype == b.dtype:
            yield left.tobytes() == right.tobytes()
        else:  # float64 holds the values of all types of weights
            yield np.array_equal(left.astype(np.float64), right.astype(np.float64))


def source_name(name: TensorName, family: Family) -> str:
    """The name that a renamed tensor has in checkpoints of its family."""
    found = family.sources().find(name.module)
    if found is None:
        return str(name)
    pattern, numbers = found
    return str(TensorName(pattern.format(**numbers), name.parameter))
