"""TensorRT-LLM's config.json, from the layout's template and the model's values (checkpoint-format, sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.model_config import ModelConfig
from pipeline.tables import merge

# An unquantized target. Quantized ones replace what differs.
QUANTIZATION: Mapping[str, Any] = {
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


def target_config(
    template: Mapping[str, Any], over: Mapping[str, Any], model: ModelConfig, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill the layout's `template`, with the family's rows `over` it, from the target's values and the model's fields."""

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(inner) for key, inner in value.items()}
        if not isinstance(value, str) or not value.startswith("$"):
            return value
        name = value[1:]
        if name == "null":
            return None
        return target[name] if name in target else getattr(model, name)

    filled: dict[str, Any] = fill(merge(template, over))
    return filled
