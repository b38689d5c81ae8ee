"""Quantization of a target: the algorithm by TensorRT-LLM's name, and what config.json says of it (quantized layouts, section
9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# In the order of config.json. Those of an unquantized target; quantized ones replace what differs.
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
WEIGHT_ONLY = {"W8A16": 8, "W4A16": 4}  # bits of the codes
GROUPWISE = {"W8A16_GPTQ": 8, "W4A16_GPTQ": 4}
FP8, FP8_ROWWISE, AWQ = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ"
CLAMP = 1200.0  # of activations, and of weights before they are quantized by row


@dataclass(frozen=True)
class Quantization:
    """How a target's linear modules are quantized.

    `algorithm`: None for not at all. `from_numbers`: the source's weights are numbers, or turned into them first; otherwise its
    codes are kept. `sm`: the GPU generation that the kernel's layout is for. `group_size`: in-features of a group. `clamp`: FP8's
    bound. `meta_recipe`: attention and the first and last layers stay unquantized. `fp8_kv_cache`: the cache's scales are written.
    """

    algorithm: str | None = None
    from_numbers: bool = True
    sm: int = 80
    group_size: int = 128
    clamp: float = CLAMP
    meta_recipe: bool = False
    fp8_kv_cache: bool = False

    @property
    def bits(self) -> int:
        """The width of integer codes; 0 where there are none."""
        return {**WEIGHT_ONLY, **GROUPWISE, AWQ: 4}.get(self.algorithm or "", 0)

    def config(self) -> dict[str, Any]:
        """config.json's `quantization` block."""
        grouped = self.algorithm in GROUPWISE
        set_ = {
            "quant_algo": self.algorithm,
            "kv_cache_quant_algo": "FP8" if self.fp8_kv_cache else None,
            "group_size": self.group_size if grouped or self.algorithm == AWQ else DEFAULTS["group_size"],
            "clamp_val": [-self.clamp, self.clamp] if self.algorithm == FP8_ROWWISE else None,
            "use_meta_recipe": self.meta_recipe,
            "has_zero_point": grouped,
            "pre_quant_scale": self.algorithm == AWQ,
        }
        return {**DEFAULTS, **set_}

    def config_set(self) -> dict[str, Any]:
        """Of that block the algorithm, and what is not the default."""
        return {key: value for key, value in self.config().items() if key == "quant_algo" or value != DEFAULTS[key]}
