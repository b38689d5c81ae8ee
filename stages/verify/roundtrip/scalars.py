"""Check the parameters that weights are not computed with: scales of activations and of the cache, and clamp bounds.

Each must be the source's own value, or the one that the format prescribes.

Facts: docs/format/quantized-layouts.md, sections 4e, 7, 8 and 11. A rank's `activation_scaling_factor` is the largest of those of
its source modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from pipeline.errors import Problem
from pipeline.model.quantization import GROUPWISE, WEIGHT_ONLY
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.origin import Origin
from stages.verify.values import plainly_positive, read, to_float32

SCALES = (
    "weights_scaling_factor",
    "weights_scaling_factor_2",
    "per_channel_scale",
    "prequant_scaling_factor",
    "activation_scaling_factor",
    "act_scale",
    "smoother",
    "scale_to_int",
    "quantization_scaling_factor",
)
CACHE = "kv_cache_scaling_factor"
# Factors of integer codes, which kernels multiply: AutoRound's symmetric ones are of either sign.
SIGNED = ("weights_scaling_factor", "per_channel_scale")


def check_scalars(checkpoint: Checkpoint, origins: Iterable[Origin], source: Mapping[str, LazyTensor]) -> Iterator[Problem]:
    """Report every scale and bound that is not the expected one.

    `origins`: of the rank's weights, which tell the source modules of each module. `source`: the source's tensors by their own
    names.
    """
    modules: dict[tuple[int, str], dict[str, None]] = defaultdict(dict)
    for origin in origins:
        modules[origin.rank, origin.module][origin.source.rpartition(".")[0]] = None
    integers = checkpoint.config.get("quantization", {}).get("quant_algo") in {**WEIGHT_ONLY, **GROUPWISE}
    either_sign = ("clamp_val", *(SIGNED if integers else ()))
    for number, rank in enumerate(checkpoint.ranks):
        for name, tensor in rank.items():
            module, _, parameter = name.rpartition(".")
            if parameter == "clamp_val":
                expected = _bounds(checkpoint)
            elif parameter == "activation_scaling_factor":
                expected = _activations(source, list(modules[number, module]))
            elif parameter == CACHE and _is_measured(checkpoint):
                expected = None  # in no source
            elif parameter == CACHE:
                left_out = checkpoint.provenance.get("left_out", ())
                used = {name: tensor for name, tensor in source.items() if name not in left_out}
                expected = _cache(used, list(modules[number, f"{module}.qkv"]))
            elif parameter in SCALES:
                expected = None
            else:
                continue
            stored = read(tensor)
            if expected is None and plainly_positive(stored):
                continue
            values = to_float32(stored)
            subject = f"rank{number}.safetensors: {name}"
            if not bool(np.isfinite(values).all()):
                yield Problem(subject, "a value that is not finite", "finite ones")
            elif parameter not in either_sign and bool((values < 0).any()):
                yield Problem(subject, "a value that is negative", "scales of 0 or more")
            elif expected is not None and not np.array_equal(values, expected):
                yield Problem(subject, str(values.tolist()), f"{expected.tolist()}, by the source")


def _is_measured(checkpoint: Checkpoint) -> bool:
    """Whether the scale of the cache is of a calibration: an INT8 cache has no other, an FP8 cache may have."""
    kind = checkpoint.config.get("quantization", {}).get("kv_cache_quant_algo")
    options = checkpoint.provenance.get("options", {})
    return kind == "INT8" or any(name in options for name in ("act_range", "calibration_tokens", "calib_dataset"))


def _bounds(checkpoint: Checkpoint) -> np.ndarray | None:
    """float32 [2]: config.json's clamp bounds, None where it has none."""
    bounds = checkpoint.config.get("quantization", {}).get("clamp_val")
    return np.array(bounds, dtype=np.float32) if bounds else None


def _largest(source: Mapping[str, LazyTensor], names: Iterable[str]) -> np.ndarray | None:
    """float32 [1]: the largest of the source's scales of some names, None where it has none of them."""
    scales = [to_float32(read(source[name])).reshape(-1) for name in names if name in source]
    return np.concatenate(scales).max().reshape(1) if scales else None


def _activations(source: Mapping[str, LazyTensor], modules: Sequence[str]) -> np.ndarray | None:
    """float32 [1]: the largest scale of some modules' activations, None where there is none. compressed-tensors' NVFP4 divides."""
    divisors = [to_float32(read(source[name])).reshape(-1) for each in modules if (name := f"{each}.input_global_scale") in source]
    if divisors:
        with np.errstate(divide="ignore"):
            largest: np.ndarray = (np.float32(1) / np.concatenate(divisors)).max(keepdims=True)
        return largest
    return _largest(source, [f"{each}.input_scale" for each in modules])


def _cache(source: Mapping[str, LazyTensor], modules: Iterable[str]) -> np.ndarray:
    """float32 [1]: the larger of the keys' and the values' scales; 1 where the source does not have both.

    Either may be the attention module's, the fused or the single projection's, or that of the projection's outputs; the attention
    module's may be one for both.
    """
    keys, values = list[str](), list[str]()
    for module in modules:
        attention, _, last = module.rpartition(".")
        for part, names in (("k", keys), ("v", values)):
            names += [f"{attention}.kv_scale", f"{attention}.{part}_scale", f"{module}.{part}_scale"]
            names += [f"{module}.output_scale"] if last == f"{part}_proj" else []
    scales = [_largest(source, names) for names in (keys, values)]
    found = [scale for scale in scales if scale is not None]
    return np.concatenate(found).max().reshape(1) if len(found) == 2 else np.ones(1, dtype=np.float32)
