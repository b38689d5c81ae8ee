"""Which algorithm a target is quantized with: what the source is, what the options ask for, and where these contradict each
other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import Problem
from pipeline.model.dtypes import MODEL_DTYPES, of_numpy
from pipeline.model.quantization import (
    AWQ,
    BOUND,
    CLAMP,
    DEFAULTS,
    FP8,
    FP8_ROWWISE,
    GROUPED,
    GROUPWISE,
    NVFP4,
    SMOOTHQUANT,
    SQ_OF_CODES,
    Quantization,
    clamp_of,
)
from pipeline.planning.generations import no_generation
from pipeline.planning.quantizations import QUANTIZATIONS, UNASKED
from pipeline.planning.quantizations import asked as asked_for
from pipeline.planning.target_options import Shape
from pipeline.printed import many, printed
from pipeline.tensor.names import TensorName, by_module
from pipeline.tensor.tensors import LazyTensor, tensor_bytes
from stages.quantization.cache_scales import PARAMETERS as CACHE
from stages.quantization.cache_scales import other_kind
from stages.quantization.compressed_settings import quantized_activations
from stages.quantization.packed_format import Modules, PackedParameter
from stages.quantization.sources import format_named

NEEDS_CODES = tuple(row.algorithm for row in QUANTIZATIONS.values() if row.calibrated)
_DEQUANTIZE = "Give --dequantize, and, where wanted, --use_weight_only or --use_fp8_rowwise"
_EACH = (
    f"{_DEQUANTIZE}, or --requantize --group_size 128 for 4 bits in groups: each module is read by its own format, and then all "
    "are quantized alike"
)


@dataclass(frozen=True)
class Packing:
    """The packed modules of a source, by the source's own names.

    `formats`: packed module -> its format. `ordered`: modules whose groups follow the activations. `outside`: packed modules that
    are numbers in every target, as a head is, of a source for which that matters. `settings`: the source's quantization settings;
    `own`: those of modules of which it says something else than of all. `cache`: what is wrong with the scales of its cache.
    """

    formats: Mapping[str, str]
    ordered: Sequence[str]
    settings: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    outside: Collection[str] = ()
    cache: Sequence[Problem] = ()

    @property
    def format(self) -> str | None:
        """The format of the source's modules; None where they are numbers, or made numbers by unpacking, as GGUF's are."""
        numbers = {name for name in set(self.formats.values()) if format_named(name).numbers}
        coded = {module: name for module, name in self.formats.items() if name not in numbers}
        return next((name for module, name in coded.items() if module not in self.outside), next(iter(coded.values()), None))

    @property
    def zero_points(self) -> bool:
        """Whether a target that keeps the source's codes by groups has zero points beside them."""
        return self.format is None or format_named(self.format).zero_points(self.settings)


def own_dtype(tensors: Mapping[TensorName, LazyTensor], packing: Packing) -> str | None:
    """The type of most of a source's weights, by TensorRT-LLM's name, for a configuration that names none.

    A quantized source has that of its 16-bit tensors, as its scales may have 32. None where no tensor is of a type that models
    compute in, and for formats that are made numbers by unpacking and have no 16-bit tensors beside these, as GGUF's.
    """
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[of_numpy(tensor.dtype).target] += tensor_bytes(tensor)
    found = [name for name in MODEL_DTYPES if sizes[name]]
    if packing.formats:
        found = [name for name in found if name != "float32"] or (found if packing.format else [])
    return max(found, key=lambda name: sizes[name], default=None)


def native(packing: Packing, tensors: Mapping[TensorName, LazyTensor]) -> tuple[str | None, int]:
    """TensorRT-LLM's algorithm that takes the source's codes as they are, and their group size; None where there is none."""
    return (None, 0) if packing.format is None else _native(packing.format, packing, by_module(tensors))


def _native(kind: str, packing: Packing, parameters: Modules) -> tuple[str | None, int]:
    """The same, of the modules of one format. `parameters`: of all modules."""
    modules = {module: parameters[module] for module, name in packing.formats.items() if name == kind}
    inside = {module: held for module, held in modules.items() if module not in packing.outside}
    return format_named(kind).native(inside or modules, packing.settings)


def _several(packing: Packing, tensors: Mapping[TensorName, LazyTensor]) -> list[Problem]:
    """The problem of a source whose modules are of formats that no single algorithm keeps; none where none keeps any of them."""
    first: dict[str, str] = {}
    for module, name in packing.formats.items():
        if module not in packing.outside:
            first.setdefault(name, module)
    if len(first) < 2:
        return []
    parameters = by_module(tensors)
    algorithms = {name: _native(name, packing, parameters)[0] for name in first}
    if len(set(algorithms.values())) < 2:
        return []
    counts = Counter(name for module, name in packing.formats.items() if module not in packing.outside)
    found = ", ".join(f"{many(count, 'module')} of {format_named(name).title}" for name, count in counts.most_common())
    expected = "one algorithm for all of them, as config.json has one"
    return [Problem(first[counts.most_common()[-1][0]], found, expected, _EACH)]


def choose(options: Shape, packing: Packing, tensors: Mapping[TensorName, LazyTensor]) -> tuple[Quantization, list[Problem]]:
    """The quantization of a target, and what keeps it from being what the options say."""
    asked, problems = _asked(options)
    own, group_size = native(packing, tensors)
    found = _found(packing, own)
    several = [] if options.dequantize or options.requantize else _several(packing, tensors)
    # Codes that no kernel takes are made numbers without being asked: the plan's notes say so.
    numbers = own is None or options.dequantize
    if options.requantize and packing.formats:
        again = asked or (own if own in GROUPWISE else "W4A16_GPTQ")
        algorithm: str | None = again
        problems += _requantized(options, again, group_size)
    elif several:
        algorithm = asked or own
        problems += several
    elif numbers:
        algorithm = asked
        if algorithm in NEEDS_CODES:
            expected = "a source that is quantized so, as its scales were calibrated"
            remedy = "Quantize it with that tool first, or use int8, int4 or --use_fp8_rowwise, which need no calibration"
            problems.append(Problem(_flag(options), found if not options.dequantize else "a dequantized source", expected, remedy))
    else:
        algorithm = asked if _takes_activations(packing, own, asked) else own
        if asked and asked != algorithm:
            problems.append(Problem(_flag(options), f"{found}, which is {own}", f"the options for {own}, or none", _DEQUANTIZE))
        problems += _act_order(packing, options)
    if not problems:  # else it is not known which algorithm is meant
        problems += _ungrouped(options, algorithm, packing)
    group = options.group_size or group_size or DEFAULTS["group_size"]
    kept = not (several or options.requantize or options.dequantize)
    if group_size and kept and options.group_size not in (None, group_size):
        problems.append(
            Problem(f"--group_size {options.group_size}", f"groups of {group_size} in the source", "that size, or no option")
        )
    problems += no_generation(algorithm, options.sm, kept=not numbers and not options.requantize)
    if options.use_meta_fp8_rowwise_recipe and algorithm != FP8_ROWWISE:
        problems.append(Problem("--use_meta_fp8_rowwise_recipe", f"{algorithm or 'no quantization'}", f"{FP8_ROWWISE}"))
    if algorithm and options.dtype == "float32":
        problems.append(
            Problem("--dtype float32", f"with {algorithm}", "float16 or bfloat16: the kernels' activations have 16 bits")
        )
    if options.dequantize and not packing.formats:
        problems.append(Problem("--dequantize", found, "a quantized source"))
    if options.requantize and not packing.formats:
        expected = "a quantized source"
        problems.append(Problem("--requantize", found, expected, "Leave it out: --use_weight_only quantizes numbers"))
    problems += _caches(options, packing, algorithm) + _smoothing(options)
    clamp, from_numbers = clamp_of(packing.settings), numbers or options.requantize
    if clamp is None and algorithm == FP8_ROWWISE:
        expected, remedy = "a finite number above 0, or null for the usual one", "Mend the quantizer's settings"
        problems.append(Problem(f"quantization_config.{BOUND}", repr(packing.settings[BOUND]), expected, remedy))
    quantization = Quantization(
        algorithm=algorithm,
        from_numbers=from_numbers,
        sm=options.sm,
        group_size=group,
        clamp=CLAMP if clamp is None else clamp,
        meta_recipe=options.use_meta_fp8_rowwise_recipe,
        fp8_kv_cache=options.fp8_kv_cache,
        zero_points=from_numbers or packing.zero_points,
        smoothquant=options.smoothquant if algorithm in SMOOTHQUANT and from_numbers else None,
        int8_kv_cache=options.int8_kv_cache,
    )
    return quantization, problems


def _found(packing: Packing, own: str | None) -> str:
    """The source in words, by what it is. `own`: TensorRT-LLM's algorithm that takes its codes as they are."""
    if not packing.formats:
        return "a source that is not quantized"
    names = " and ".join([packing.format] if packing.format else dict.fromkeys(packing.formats.values()))
    return f"a source quantized as {names}{'' if own else ', whose codes no algorithm of TensorRT-LLM takes'}"


def _takes_activations(packing: Packing, own: str | None, asked: str | None) -> bool:
    """Whether codes that TensorRT-LLM takes as `own`, with activations in 16 bits, are asked for with activations of 8 bits.

    As the source means them: int8, quantized for each token where they are computed.
    """
    if packing.format is None or asked != SQ_OF_CODES or own != "W8A16" or asked not in format_named(packing.format).keeps:
        return False
    return quantized_activations(packing.settings).startswith("integers of 8 bits, dynamic")


def _ungrouped(options: Shape, algorithm: str | None, packing: Packing) -> list[Problem]:
    """The problem of a size of groups where the target has none. NVIDIA's default, which people paste, says nothing."""
    size = options.group_size
    if size in (None, DEFAULTS["group_size"]) or algorithm in GROUPED or (options.requantize and not packing.formats):
        return []
    found = f"{algorithm}, which has no groups" if algorithm else "nothing that is quantized"
    awq = f"--quantization int4_awq --group_size {size} with a calibration, such as --calibration_tokens FILE"
    again = f"--requantize --quantization int4_gptq --group_size {size}"
    remedy = f"Give {again if packing.formats else awq}, or leave it out"
    return [Problem(f"--group_size {size}", found, "an algorithm that has groups", remedy)]


def _caches(options: Shape, packing: Packing, algorithm: str | None) -> list[Problem]:
    """The problems of the source's scales for an FP8 cache, and of an INT8 cache beside a second kind of cache, or float8."""
    if not options.int8_kv_cache:
        used = options.fp8_kv_cache and not other_kind(packing.settings)
        remedy = "Leave out --fp8_kv_cache: then these scales are left out, too"
        return [replace(problem, remedy=remedy) for problem in packing.cache] if used else []
    if options.fp8_kv_cache:
        return [Problem("--int8_kv_cache", "--fp8_kv_cache too", "one kind of cache")]
    if algorithm in (FP8, FP8_ROWWISE, NVFP4):
        expected = "integer weights, or none that are quantized"
        return [Problem("--int8_kv_cache", f"with {algorithm}", expected, "Give --fp8_kv_cache instead")]
    return []


def _smoothing(options: Shape) -> list[Problem]:
    """The kinds of SmoothQuant's scales, where nothing asks for SmoothQuant."""
    if options.smoothquant is not None:
        return []
    given = [f"--{name}" for name in ("per_channel", "per_token") if getattr(options, name)]
    return [Problem(" ".join(given), "no --smoothquant", "--smoothquant ALPHA beside it")] if given else []


def _asked(options: Shape) -> tuple[str | None, list[Problem]]:
    """The algorithm that the options name, and what is wrong with several."""
    flags = {flag: getattr(options, flag) for flag in UNASKED}
    named = [str(QUANTIZATIONS[name].algorithm) for name in asked_for(flags)]
    if len(named) > 1:
        return named[0], [Problem(_flag(options), " and ".join(named), "one algorithm")]
    return (named[0] if named else None), []


def _flag(options: Shape) -> str:
    flags = [f"--weight_only_precision {options.weight_only_precision}"] if options.use_weight_only else []
    flags += [f"--{name}" for name in ("use_fp8", "use_fp8_rowwise", "use_nvfp4") if getattr(options, name)]
    flags += [f"--smoothquant {options.smoothquant}"] if options.smoothquant is not None else []
    return " ".join(flags) or "--use_weight_only"


def _requantized(options: Shape, algorithm: str, group_size: int) -> list[Problem]:
    problems = []
    if options.dequantize:
        problems.append(Problem("--requantize", "--dequantize too", "one of them"))
    if algorithm in (AWQ, FP8, NVFP4):
        expected = "int4_gptq, int8_gptq, int8, int4 or --use_fp8_rowwise: the others need calibration"
        problems.append(Problem(_flag(options), "--requantize", expected))
    if algorithm in GROUPWISE and not (options.group_size or group_size):
        problems.append(Problem("--group_size", "nothing, and no groups in the source", "a group size such as 128"))
    return problems


def _act_order(packing: Packing, options: Shape) -> list[Problem]:
    ordered = [module for module in packing.ordered if module not in packing.outside]
    if not ordered or options.requantize:
        return []
    found = f"groups in the order of the activations (desc_act), in {many(len(ordered), 'module')}"
    remedy = "Give --requantize to quantize again by round-to-nearest, which adds error, or --dequantize"
    known = format_named(packing.formats[ordered[0]]).parameters
    index = next((name for name, held in known.items() if held.becomes == "group_index"), "group_index")
    expected = f"groups of consecutive in-features: the kernels read no {index}"
    return [Problem(f"{ordered[0]}.{index}", found, expected, remedy)]


def clean_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings in a source's configuration, as one flat table; empty where it has none."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return {}
    inner = settings.get("quantization")
    return {**settings, **inner} if isinstance(inner, Mapping) else dict(settings)


def dequantization_notes(packing: Packing, chosen: Sequence[Quantization], dequantize: bool) -> tuple[str, ...]:
    """Names the formats that are made numbers without being asked to, for the plan. `dequantize`: the option asks for it."""
    kinds, every = map(format_named, dict.fromkeys(packing.formats.values())), all(each.from_numbers for each in chosen)
    made = [kind for kind in kinds if kind.numbers or every]
    if dequantize or not made:
        return ()
    targets = ", ".join(dict.fromkeys(each.algorithm or "a 16-bit target" for each in chosen if each.from_numbers))
    titles = " and ".join(each.title for each in made)
    return (f"dequantized: TensorRT-LLM 1.2 has no algorithm that takes {titles} as it is; its numbers become {targets}",)


def unused(packing: Packing, tensors: Mapping[TensorName, LazyTensor], chosen: Sequence[Quantization]) -> dict[TensorName, str]:
    """The tensors of a packed source that no target has a place for, each with the reason."""
    cache = any(quantization.fp8_kv_cache for quantization in chosen)
    static = any(quantization.algorithm in (FP8, NVFP4) and not quantization.from_numbers for quantization in chosen)
    reasons = {
        "group_index": "groups of consecutive in-features need no list of them" if not packing.ordered else "",
        "kv_scale": _unused_cache(packing, cache),
        "input_scale": "" if static else "the activations have no scale of their own in the target",
    }
    result = dict[TensorName, str]()
    for module, parameters in by_module(tensors).items():
        known = format_named(packing.formats[module]).parameters if module in packing.formats else {}
        for parameter in parameters:
            described = CACHE.get(parameter) or known.get(parameter, PackedParameter(()))
            if reason := described.dropped or ((known or described.becomes) and reasons.get(described.becomes or parameter, "")):
                result[TensorName(module, parameter)] = reason
    return result


def _unused_cache(packing: Packing, cache: bool) -> str:
    """Why the scales of the source's cache are left out; "" where they are not. `cache`: a target has scales of an FP8 cache."""
    if kind := other_kind(packing.settings):
        return f"the scale of a cache of {printed(kind)}, which is not that of an FP8 cache"
    return "" if cache else "the scale of an FP8 cache, which --fp8_kv_cache would write"
