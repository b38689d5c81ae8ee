"""Check the parameters that weights are not computed with: scales of activations and of the cache, and clamp bounds.

Each must be the source's own value, or the one that the format prescribes.

Facts: docs/format/quantized-layouts.md, sections 4e, 7, 8 and 11. A rank's `activation_scaling_factor` is the largest of those of
its source modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import Problem
from pipeline.model.quantization import GROUPWISE, WEIGHT_ONLY
from pipeline.tensor.checkpoint import Checkpoint
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.origin import Origin
from stages.verify.roundtrip.original import Original
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
CACHE, RECIPROCAL = "kv_cache_scaling_factor", "kv_cache_rcp_scaling_factor"
# Factors of integer codes, which kernels multiply: AutoRound's symmetric ones are of either sign.
SIGNED = ("weights_scaling_factor", "per_channel_scale")
# What activations are multiplied or divided by. Scales of weights may be 0, where all of these are.
OF_ACTIVATIONS = (
    "activation_scaling_factor",
    "act_scale",
    "smoother",
    "scale_to_int",
    "quantization_scaling_factor",
    CACHE,
    RECIPROCAL,
)
COMPUTED = 2.0**-20  # of a value: what is computed of the source's may be off by


@dataclass(frozen=True)
class _Expected:
    """The values of a scale or bound, float32, and how far off it may be. `values` None: any that are finite, and not negative."""

    values: np.ndarray | None = None
    off: float = 0.0
    why: str = "by the source"


def check_scalars(checkpoint: Checkpoint, origins: Iterable[Origin], original: Original, kept: bool) -> Iterator[Problem]:
    """Report every scale and bound that is not the expected one.

    `origins`: of the rank's weights, which tell the source modules of each module. `original`: the source. `kept`: the codes of a
    packed source are in the rank files unchanged.
    """
    integers = checkpoint.config.get("quantization", {}).get("quant_algo") in {**WEIGHT_ONLY, **GROUPWISE}
    either_sign = ("clamp_val", *(SIGNED if integers else ()))
    rules = _ScaleRules(checkpoint, origins, original, kept)
    for number, rank in enumerate(checkpoint.ranks):
        for name, tensor in rank.items():
            parameter = name.rpartition(".")[2]
            if parameter not in (*SCALES, CACHE, RECIPROCAL, "clamp_val"):
                continue
            expected, stored = rules.of(number, name), read(tensor)
            above = parameter in OF_ACTIVATIONS and expected.values is None
            if expected.values is None and not above and plainly_positive(stored):
                continue
            values = to_float32(stored).reshape(-1)
            subject = f"rank{number}.safetensors: {name}"
            if not bool(np.isfinite(values).all()):
                yield Problem(subject, "a value that is not finite", "finite ones")
            elif parameter not in either_sign and bool((values < 0).any()):
                yield Problem(subject, "a value that is negative", "scales of 0 or more")
            elif above and bool((values == 0).any()):
                yield Problem(subject, "a scale of 0", "scales above 0, as activations are multiplied or divided by them")
            elif expected.values is not None and not _equal(values, expected):
                yield Problem(subject, str(values.tolist()), f"{expected.values.tolist()}, {expected.why}")


class _ScaleRules:
    """The rules by which each scale and bound of a checkpoint is told."""

    def __init__(self, checkpoint: Checkpoint, origins: Iterable[Origin], original: Original, kept: bool) -> None:
        self._checkpoint, self._original, self._kept = checkpoint, original, kept
        self._beside = original.beside(checkpoint.provenance.get("left_out", ()))
        # The source modules of each expert of a rank's module, or of the module, as of an expert 0.
        self._modules: dict[tuple[int, str], dict[int, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for origin in origins:
            if origin.source:
                self._modules[origin.rank, origin.module][origin.expert or 0][origin.source.rpartition(".")[0]] = None

    def of(self, rank: int, name: str) -> _Expected:
        """The values of the parameter of a rank that has this name."""
        module, _, parameter = name.rpartition(".")
        if parameter == "clamp_val":
            return _Expected(_bounds(self._checkpoint), why="the clamp_val of config.json")
        if parameter == "activation_scaling_factor":
            return _Expected(_activations(self._beside, self._all(rank, module)))
        if parameter == RECIPROCAL:
            return self._reciprocal(rank, module)
        if parameter == CACHE:  # a measured one is in no source
            sources = self._all(rank, f"{module}.qkv")
            return _Expected() if _is_measured(self._checkpoint) else _Expected(_cache(self._beside, sources))
        return self._of_weights(rank, module) if self._kept and parameter == self._common(rank, module) else _Expected()

    def _all(self, rank: int, module: str) -> list[str]:
        return list(dict.fromkeys(name for names in self._modules[rank, module].values() for name in names))

    def _common(self, rank: int, module: str) -> str:
        """The parameter that is the one scale of a matrix of float8 or 4-bit floats; "" where there is none."""
        tensors = self._checkpoint.ranks[rank]
        if f"{module}.weights_scaling_factor_2" in tensors:
            return "weights_scaling_factor_2"
        weight = tensors.get(f"{module}.weight")
        return "weights_scaling_factor" if weight is not None and weight.dtype.name.startswith("float8") else ""

    def _of_weights(self, rank: int, module: str) -> _Expected:
        """The largest of the scales of a module's weights, of each expert."""
        known, by_expert = self._original.names(), self._modules[rank, module]
        found = [[f"{each}.weight" for each in by_expert[expert]] for expert in sorted(by_expert)]
        scales = [[self._original.common_scale(name) if name in known else None for name in names] for names in found]
        told = [[scale for scale in some if scale is not None] for some in scales]
        if not told or told != scales:
            return _Expected()
        return _Expected(np.array(list(map(max, told)), dtype=np.float32), COMPUTED)

    def _reciprocal(self, rank: int, module: str) -> _Expected:
        scale = self._checkpoint.ranks[rank].get(f"{module}.{CACHE}")
        if scale is None:
            return _Expected()
        with np.errstate(divide="ignore"):
            inverse: np.ndarray = np.float32(1) / to_float32(read(scale)).reshape(-1)
        return _Expected(inverse, COMPUTED, f"1 / {CACHE}")


def _equal(values: np.ndarray, expected: _Expected) -> bool:
    """Whether values are the expected ones."""
    assert expected.values is not None, "asked for with some"
    wanted = expected.values.reshape(-1)
    return len(values) == len(wanted) and bool((np.abs(values - wanted) <= np.abs(wanted) * np.float32(expected.off)).all())


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
            names += [f"{module}.output_scale"] if last in (f"{part}_proj", "qkv_proj") else []
    scales = [_largest(source, names) for names in (keys, values)]
    found = [scale for scale in scales if scale is not None]
    return np.concatenate(found).max().reshape(1) if len(found) == 2 else np.ones(1, dtype=np.float32)
