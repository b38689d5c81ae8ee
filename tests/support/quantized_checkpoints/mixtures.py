"""Several formats in one model."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.quantized_checkpoints.base import PLACES, Format, Packed


def each_its_own(kinds: dict[str, Format], settings: dict[str, Any], files: dict[str, dict[str, Any]] | None = None) -> Format:
    """Modules of several formats, by the first part of their names that fits ("": all); those of no format are not quantized."""

    def quantize(module: str, weight: np.ndarray) -> Packed:
        kind = own(kinds, module)
        assert kind is not None, "skipped"
        return kind.quantizer(module, weight)

    return Format(quantize, settings, "", files or {}, skip=lambda module, layers: own(kinds, module) is None)  # noqa: ARG005


def own(kinds: dict[str, Format], module: str) -> Format | None:
    """The format of a module, by the first part of its name that fits."""
    return next((kind for part, kind in kinds.items() if part in module), None)


def mixed_precision(kinds: dict[str, Format], layers: int) -> Format:
    """ModelOpt's export of a model in several algorithms (MIXED_PRECISION), the modules' own in `quantized_layers`."""
    quantized_layers = {}
    for module in (f"model.layers.{n}.{place}" for n in range(layers) for place in PLACES):
        kind = own(kinds, module)
        if kind is not None:
            said = kind.files["hf_quant_config.json"]["quantization"]
            quantized_layers[module] = {key: said[key] for key in ("quant_algo", "group_size") if key in said}
    held = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": quantized_layers}
    said = {"producer": {"name": "modelopt", "version": "0.35.0"}, "quantization": {**held, "exclude_modules": ["lm_head"]}}
    return each_its_own(kinds, {}, {"hf_quant_config.json": said})
