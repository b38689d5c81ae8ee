"""Read the scaling of rotary positions from a model's configuration, in both styles of config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MROPE = "mrope"  # positions of several axes (time, height, width), which are one and the same in text
LONG_ROPE = ("longrope", "su")  # the second is what early Phi-3 models call it


def rotary_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` as it is, or its equivalent from transformers 5's `rope_parameters`; None where nothing is scaled.

    Raises TypeError where either is not an object.
    """
    scaling = config.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, Mapping):
            raise TypeError
        return dict(scaling)
    parameters = config.get("rope_parameters")
    if parameters is None:
        return None
    if not isinstance(parameters, Mapping):
        raise TypeError
    # A model with sliding and full layers has parameters for each kind; only those of full layers can be scaled.
    parameters = parameters.get("full_attention", parameters)
    rest = {key: value for key, value in dict(parameters).items() if key not in ("rope_theta", "partial_rotary_factor")}
    return None if rest.get("rope_type", "default") == "default" else rest


def yarn_factor(factor: float, scale: float) -> float:
    """Return yarn's factor of rotated values for one of its scales (`mscale`, `mscale_all_dim`)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
