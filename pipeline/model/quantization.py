"""Quantization of a target: the algorithm by TensorRT-LLM's name, and its block in config.json.

Facts: docs/format/quantized-layouts.md, section 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pipeline.model.kernels import ANY, Generation

# The `quantization` block of an unquantized target, in config.json's order; a quantized target replaces some values.
DEFAULTS: dict[str, Any] = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}
WEIGHT_ONLY = {"W8A16": 8, "W4A16": 4}  # algorithm -> bits of an integer code
GROUPWISE = {"W8A16_GPTQ": 8, "W4A16_GPTQ": 4}
FP8, FP8_ROWWISE, AWQ, NVFP4 = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "NVFP4"
GROUPED = (*GROUPWISE, AWQ, NVFP4)  # a scale for each group of a row's in-features
# By whether each row of a weight has a scale, and each token of the activations.
SQ_KINDS = {
    (False, False): "W8A8_SQ_PER_TENSOR_PLUGIN",
    (True, False): "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    (False, True): "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    (True, True): "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
}
SMOOTHQUANT = tuple(SQ_KINDS.values())
SQ_OF_CODES = SQ_KINDS[True, True]  # the one that takes int8 codes with a scale a row, as activations are quantized in the engine
NVFP4_GROUP = 16  # in-features of an NVFP4 scale
CLAMP = 1200.0  # FP8 by row clamps activations, and weights before they are quantized, to this absolute value
BOUND = "activation_scale_ub"  # the key of a quantizer's settings that says another one
_LARGEST = 3.4028234663852886e38  # a float32, which the bound is for the kernels


def clamp_of(settings: Mapping[str, Any]) -> float | None:
    """The absolute bound of FP8 by row that a quantizer's settings say, CLAMP where they say none; None where it is no bound."""
    said = settings.get(BOUND)
    if said is None:
        return CLAMP
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said <= _LARGEST:
        return None
    return float(said)


@dataclass(frozen=True)
class Quantization:
    """The quantization of a target's linear modules.

    Parameters
    ----------
    algorithm
        TensorRT-LLM's name of it; None for an unquantized target.
    from_numbers
        Quantize from floating-point weights, dequantizing the source first where it is packed; otherwise keep the source's codes.
    sm
        The GPU generation (80 for SM 8.0) whose kernels the weights are arranged for; "any" for weights in no order.
    group_size
        The number of in-features that share a scale.
    clamp
        The absolute bound of FP8 by row.
    meta_recipe
        Leave attention and the first and last layers unquantized.
    fp8_kv_cache
        Write scales for an FP8 key-value cache.
    exclude
        Patterns of module names that stay unquantized, in the place of TensorRT-LLM's own list; () for that one.
    zero_points
        Write a zero point for each group beside its scale, in algorithms that take some.
    smoothquant
        SmoothQuant's alpha: how much of what is hard to quantize goes from activations to weights; None where nothing is smoothed.
    int8_kv_cache
        Write scales for an INT8 key-value cache, of measured ranges.
    """

    algorithm: str | None = None
    from_numbers: bool = True
    sm: Generation = 80
    group_size: int = 128
    clamp: float = CLAMP
    meta_recipe: bool = False
    fp8_kv_cache: bool = False
    exclude: tuple[str, ...] = ()
    zero_points: bool = True
    smoothquant: float | None = None
    int8_kv_cache: bool = False

    @property
    def per_channel(self) -> bool:
        """Whether SmoothQuant has a scale for each row of a weight."""
        return self.algorithm in (SQ_KINDS[True, False], SQ_KINDS[True, True])

    @property
    def per_token(self) -> bool:
        """Whether SmoothQuant's activations get a scale for each token where the engine runs."""
        return self.algorithm in (SQ_KINDS[False, True], SQ_KINDS[True, True])

    @property
    def bits(self) -> int:
        """The width of an integer code in bits; 0 where weights have no integer codes."""
        return {**WEIGHT_ONLY, **GROUPWISE, AWQ: 4}.get(self.algorithm or "", 0)

    def excludes(self, module: str) -> bool:
        """Whether a pattern names a module, such as `transformer.layers.0.attention.qkv`, or a module around it."""
        if not self.exclude:
            return False
        parts = module.split(".")
        around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        return any(fnmatchcase(name, pattern) for name in around for pattern in self.exclude)

    @property
    def left_to_loader(self) -> bool:
        """Whether weights stay numbers, which TensorRT-LLM's loader quantizes (docs/format/runtime-1.2.md, section d4)."""
        return self.sm == ANY and self.algorithm in WEIGHT_ONLY

    @property
    def ordered(self) -> bool:
        """Whether weights are in an order that one kernel reads."""
        return self.algorithm in GROUPWISE or (self.algorithm in WEIGHT_ONLY and not self.left_to_loader)

    def config(self) -> dict[str, Any]:
        """Return config.json's `quantization` block."""
        grouped = self.algorithm in GROUPWISE
        values = {
            "quant_algo": self.algorithm,
            "kv_cache_quant_algo": "INT8" if self.int8_kv_cache else "FP8" if self.fp8_kv_cache else None,
            "group_size": self.group_size if self.algorithm in GROUPED else DEFAULTS["group_size"],
            "smoothquant_val": DEFAULTS["smoothquant_val"] if self.smoothquant is None else self.smoothquant,
            "clamp_val": [-self.clamp, self.clamp] if self.algorithm == FP8_ROWWISE else None,
            "use_meta_recipe": self.meta_recipe,
            "has_zero_point": grouped and self.zero_points,
            "pre_quant_scale": self.algorithm == AWQ,
            "exclude_modules": list(self.exclude) or None,
        }
        return {**DEFAULTS, **values}

    def config_set(self) -> dict[str, Any]:
        """Return the entries of that block that differ from DEFAULTS, and `quant_algo` in any case."""
        return {key: value for key, value in self.config().items() if key == "quant_algo" or value != DEFAULTS[key]}
