"""AutoRound's settings: it stores modules as GPTQ or AutoAWQ do, and its settings say how the zero points of these are meant.

Facts: docs/format/quantized-layouts.md, section 11.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stages.quantization.bit_planes import PLANAR, checkpoint_format

_WIDTH = 16  # bits of a module that is left as it is


def is_auto_round(settings: Mapping[str, Any]) -> bool:
    """Whether AutoRound wrote the settings, under its present name or as `intel/auto-round`."""
    return str(settings.get("quant_method", "")).lower().replace("_", "-").removeprefix("intel/") in ("auto-round", "autoround")


def packing_format(settings: Mapping[str, Any]) -> str:
    """The format that modules are packed in: `auto_round:auto_gptq` and its like; before 0.5 it stood under `backend`."""
    named = [str(settings.get(key) or "").lower().replace("-", "_") for key in ("packing_format", "backend")]
    return next((name for name in named if name.startswith(("auto_round", "autoround"))), "auto_round:auto_gptq")


def stores_the_zero(settings: Mapping[str, Any]) -> bool:
    """Whether GPTQ's `qzeros` hold the zero points themselves, and not one less."""
    if not is_auto_round(settings):
        return checkpoint_format(settings) in ("gptq_v2", PLANAR)
    named = packing_format(settings)
    return "gptqmodel" in named or "gptq" not in named


def module_settings(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of one module: those of all with what `extra_config` has for its name, or for a pattern that finds it."""
    extra = settings.get("extra_config")
    if not is_auto_round(settings) or not isinstance(extra, Mapping):
        return settings
    own = extra.get(module)
    if own is None:
        own = next((values for pattern, values in extra.items() if _finds(str(pattern), module)), None)
    return {**settings, **own} if isinstance(own, Mapping) else settings


def activation_bits(settings: Mapping[str, Any]) -> int:
    """The width of the activations that AutoRound quantized for; 16 where it left them."""
    bits = settings.get("act_bits")
    return bits if is_auto_round(settings) and isinstance(bits, int) and not isinstance(bits, bool) else _WIDTH


def _finds(pattern: str, module: str) -> bool:
    """Whether a key of `extra_config` that is no module's name, but a regular expression, finds a module."""
    if not re.search(r"[*+?^$\[(|\\]", pattern):
        return False
    try:
        return re.search(pattern, module) is not None
    except re.error:
        return False
