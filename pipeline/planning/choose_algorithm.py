"""Which algorithm a target is quantized with: what the source is, what the options ask for, and where these contradict each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Problem
from pipeline.model.quantization import AWQ, CLAMP, FP8, FP8_ROWWISE, Quantization, packing_bits
from pipeline.planning.job import Shape
from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import LazyTensor

BY_PRECISION = {"int8": "W8A16", "int4": "W4A16", "int4_gptq": "W4A16_GPTQ", "int8_gptq": "W8A16_GPTQ", "int4_awq": AWQ}
NEEDS_CODES = ("W4A16_GPTQ", "W8A16_GPTQ", AWQ, FP8)
_DEQUANTIZE = "Give --dequantize, and, where wanted, --use_weight_only or --use_fp8_rowwise"


@dataclass(frozen=True)
class Packing:
    """What a source's packed modules are, by the source's own names.

    `formats`: packed module -> its format. `ordered`: modules whose groups follow the activations. `settings`: what the quantizer
    says.
    """

    formats: Mapping[str, str]
    ordered: Sequence[str]
    settings: Mapping[str, Any]

    @property
    def format(self) -> str | None:
        """The format of the source's modules; None where they are numbers already (GGUF's are made numbers by unpacking)."""
        return next((name for name in self.formats.values() if name != "gguf"), None)


def native(packing: Packing, tensors: Mapping[TensorName, LazyTensor]) -> tuple[str | None, int]:
    """TensorRT-LLM's algorithm that takes the source's codes as they are, and their group size; None where there is none."""
    module = next((name for name, kind in packing.formats.items() if kind != "gguf"), None)
    if module is None:
        return None, 0
    kind = packing.formats[module]
    if kind in ("gptq", "awq"):
        words, scales = tensors[TensorName(module, "qweight")].shape, tensors[TensorName(module, "scales")].shape
        bits = 4 if kind == "awq" else 32 * tensors[TensorName(module, "qzeros")].shape[-1] // scales[-1]
        features = words[0] if kind == "awq" else words[0] * 32 // bits
        return f"W{bits}A16_GPTQ", features // scales[0]
    if kind == "modelopt-awq":
        return AWQ, tensors[TensorName(module, "weight")].shape[1] // tensors[TensorName(module, "weight_scale")].shape[1]
    if kind == "compressed-tensors":
        if TensorName(module, "weight_packed") not in tensors:
            return None, 0
        packed, scales = tensors[TensorName(module, "weight_packed")].shape, tensors[TensorName(module, "weight_scale")].shape
        bits = packing_bits(packing.settings)
        if bits not in (4, 8):
            return None, 0
        return f"W{bits}A16_GPTQ", packed[1] * 32 // bits // scales[1]
    # One scale of the activations in every module, or else none is of use.
    static = all(TensorName(name, "input_scale") in tensors for name, kind in packing.formats.items() if kind == "float8")
    return (FP8 if static else FP8_ROWWISE), 0


def choose(options: Shape, packing: Packing, tensors: Mapping[TensorName, LazyTensor]) -> tuple[Quantization, list[Problem]]:
    """The quantization of a target, and what keeps it from being what the options say."""
    asked, problems = _asked(options)
    own, group_size = native(packing, tensors)
    found = f"a source quantized as {packing.format}" if packing.format else "a source that is not quantized"
    numbers = packing.format is None or options.dequantize
    if options.requantize and packing.format:
        again = asked or "W4A16_GPTQ"
        algorithm: str | None = again
        problems += _requantized(options, again, group_size)
    elif numbers:
        algorithm = asked
        if algorithm in NEEDS_CODES:
            expected = "a source that is quantized so, as its scales were calibrated"
            remedy = "Quantize it with that tool first, or use int8, int4 or --use_fp8_rowwise, which need no calibration"
            problems.append(Problem(_flag(options), found if not options.dequantize else "a dequantized source", expected, remedy))
    else:
        algorithm = own
        if own is None:
            problems.append(Problem(packing.format or "", found, "weights that one of TensorRT-LLM's kernels takes", _DEQUANTIZE))
        elif asked and asked != own:
            problems.append(Problem(_flag(options), f"{found}, which is {own}", f"the options for {own}, or none", _DEQUANTIZE))
        problems += _act_order(packing, options)
    group = options.group_size or group_size or 128
    if group_size and not options.requantize and not options.dequantize and options.group_size not in (None, group_size):
        problems.append(
            Problem(f"--group_size {options.group_size}", f"groups of {group_size} in the source", "that size, or no option")
        )
    if options.use_meta_fp8_rowwise_recipe and algorithm != FP8_ROWWISE:
        problems.append(Problem("--use_meta_fp8_rowwise_recipe", f"{algorithm or 'no quantization'}", f"{FP8_ROWWISE}"))
    if algorithm and options.dtype == "float32":
        problems.append(
            Problem("--dtype float32", f"with {algorithm}", "float16 or bfloat16: the kernels' activations have 16 bits")
        )
    if (options.dequantize or options.requantize) and packing.format is None:
        flag = "--dequantize" if options.dequantize else "--requantize"
        expected = "a source whose codes could be kept: GGUF's are made numbers in any case"
        problems.append(Problem(flag, found, expected))
    bound = packing.settings.get("activation_scale_ub")
    quantization = Quantization(
        algorithm=algorithm,
        from_numbers=numbers or options.requantize,
        sm=options.sm,
        group_size=group,
        clamp=float(bound) if isinstance(bound, int | float) else CLAMP,
        meta_recipe=options.use_meta_fp8_rowwise_recipe,
        fp8_kv_cache=options.fp8_kv_cache,
    )
    return quantization, problems


def _asked(options: Shape) -> tuple[str | None, list[Problem]]:
    """The algorithm that the options name, and what is wrong with several."""
    named = []
    if options.use_weight_only:
        named.append(BY_PRECISION[options.weight_only_precision])
    named += [FP8] if options.use_fp8 else []
    named += [FP8_ROWWISE] if options.use_fp8_rowwise else []
    if len(named) > 1:
        return named[0], [Problem(_flag(options), " and ".join(named), "one algorithm")]
    return (named[0] if named else None), []


def _flag(options: Shape) -> str:
    flags = [f"--weight_only_precision {options.weight_only_precision}"] if options.use_weight_only else []
    flags += [f"--{name}" for name in ("use_fp8", "use_fp8_rowwise") if getattr(options, name)]
    return " ".join(flags) or "--use_weight_only"


def _requantized(options: Shape, algorithm: str, group_size: int) -> list[Problem]:
    problems = []
    if options.dequantize:
        problems.append(Problem("--requantize", "--dequantize too", "one of them"))
    if algorithm in (AWQ, FP8, "W8A16_GPTQ"):
        expected = "int4_gptq, int8, int4 or --use_fp8_rowwise: the others need calibration"
        problems.append(Problem(_flag(options), "--requantize", expected))
    if algorithm == "W4A16_GPTQ" and not (options.group_size or group_size):
        problems.append(Problem("--group_size", "nothing, and no groups in the source", "a group size such as 128"))
    return problems


def _act_order(packing: Packing, options: Shape) -> list[Problem]:
    if not packing.ordered or options.requantize:
        return []
    count = len(packing.ordered)
    found = f"groups in the order of the activations (desc_act), in {count} modules"
    remedy = "Give --requantize to quantize again by round-to-nearest, which adds error, or --dequantize"
    return [Problem(f"{packing.ordered[0]}.g_idx", found, "groups of consecutive in-features: the kernels read no g_idx", remedy)]


def clean_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a source's configuration says of its quantization, flat; nothing where it says nothing."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return {}
    inner = settings.get("quantization")
    return {**settings, **inner} if isinstance(inner, Mapping) else dict(settings)


def unused(packing: Packing, tensors: Mapping[TensorName, LazyTensor], chosen: Sequence[Quantization]) -> dict[TensorName, str]:
    """What of a packed source no target has a place for, and why: scales that are not asked for, and orders that say nothing."""
    cache = any(quantization.fp8_kv_cache for quantization in chosen)
    static = any(quantization.algorithm == FP8 and not quantization.from_numbers for quantization in chosen)
    reasons = {
        "g_idx": "groups of consecutive in-features need no list of them" if not packing.ordered else "",
        "k_scale": "" if cache else "the scale of an FP8 cache, which --fp8_kv_cache would write",
        "v_scale": "" if cache else "the scale of an FP8 cache, which --fp8_kv_cache would write",
        "input_scale": "" if static else "the activations are not FP8 with one scale",
        "input_scale_ub": "the bound of activations is written from the settings",
        "weight_shape": "the shape is that of the model's configuration",
    }
    given = {parameter: reason for parameter, reason in reasons.items() if reason}
    names = {TensorName(module, parameter): reason for module in packing.formats for parameter, reason in given.items()}
    return {name: reason for name, reason in names.items() if name in tensors}
