"""compressed-tensors' settings: schemes by group of modules (`config_groups`), each with its weights and its activations.

Facts: docs/format/quantized-layouts.md, sections 9b and 10.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN_BITS = "num_bits"  # the width of one module's codes, where it is not that of the first scheme


def schemes(settings: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The schemes' `part` ("weights", "input_activations"), of those that have it."""
    groups = settings.get("config_groups")
    each = groups.values() if isinstance(groups, Mapping) else ()
    parts = [scheme.get(part) for scheme in each if isinstance(scheme, Mapping)]
    return [found for found in parts if isinstance(found, Mapping)]


def widths(settings: Mapping[str, Any]) -> list[int]:
    """The widths of weights in bits, the first scheme's first; 0 for what is no width."""
    said = [weights.get("num_bits", 4) for weights in schemes(settings, "weights")]
    return [bits if isinstance(bits, int) and not isinstance(bits, bool) else 0 for bits in said]


def bits_of(settings: Mapping[str, Any]) -> int:
    """The width of a packed module's weights, by its own settings: the first scheme's, and 4 where there is none."""
    own = settings.get(OWN_BITS)
    return own if isinstance(own, int) and not isinstance(own, bool) else (widths(settings) or [4])[0]


def nibbles(settings: Mapping[str, Any]) -> bool:
    """Whether all weights are of 4 bits: those that are stored as int8 too."""
    return set(widths(settings)) == {4}


def group_counts(settings: Mapping[str, Any], features: int) -> set[int]:
    """The numbers of groups that the schemes have for a row of so many in-features; empty where one of them does not say."""
    counts = set()
    for weights in schemes(settings, "weights"):
        strategy, size = weights.get("strategy"), weights.get("group_size")
        if strategy in ("channel", "tensor"):
            counts.add(1)
        elif strategy == "group" and isinstance(size, int) and size > 0:
            counts.add(features // size)
        else:
            return set()
    return counts


def asymmetric(settings: Mapping[str, Any]) -> bool:
    """Whether all that the settings say of weights is that they have zero points."""
    weights = schemes(settings, "weights")
    return bool(weights) and all(each.get("symmetric") is False for each in weights)


def quantized_activations(settings: Mapping[str, Any]) -> str:
    """How the source's kernels quantize activations, in words; "" where they leave them."""
    for each in schemes(settings, "input_activations"):
        kind = "integers" if each.get("type", "int") == "int" else "floats"
        how = [f"by {each['strategy']}"] if isinstance(each.get("strategy"), str) else []
        return ", ".join([f"{kind} of {each.get('num_bits', 8)} bits", "dynamic" if each.get("dynamic") else "static", *how])
    return ""
