"""Read the scaling of rotary positions from a model's configuration, in both styles of config.json.

Facts: docs/format/checkpoint.md, section 12, and docs/format/runtime-1.2.md, sections b to b4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.errors import Problem

MROPE = "mrope"  # positions of several axes (time, height, width), which are one and the same in text
LONG_ROPE = ("longrope", "su")  # the second is what early Phi-3 models call it

_STYLES = ("rope_scaling", "rope_parameters")  # the second is transformers 5's
_KINDS = ("rope_type", "type")  # the second is the older name
_BESIDE = ("rope_theta", "partial_rotary_factor")  # in the same object, and of no scaling
# Numbers of a scaling: those above 0, and those of 0 or more.
_ABOVE_0 = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "alpha",
    "attention_factor",
)
_OF_0_OR_MORE = ("mscale", "mscale_all_dim")
_SAME = {MROPE: "default", "su": "longrope"}  # two names of what is computed alike, of text


def scaling_kind(scaling: Mapping[str, Any]) -> str:
    """Return the kind of a scaling by the name that its configuration has for it, such as "llama3"; "default" for none."""
    return str(next((scaling[key] for key in _KINDS if scaling.get(key) is not None), "default"))


def two_kinds(scaling: Mapping[str, Any]) -> str:
    """Return the keys of a scaling that name its kind, with both values, where these are two kinds; "" where they are not.

    transformers goes by `rope_type`, TensorRT-LLM by `type`.
    """
    told = {key: scaling[key] for key in _KINDS if scaling.get(key) is not None}
    alike = {_SAME.get(str(kind), str(kind)) for kind in told.values()}
    return ", ".join(f"{key} {kind!r}" for key, kind in told.items()) if len(alike) > 1 else ""


def is_factor(value: Any) -> bool:
    """Whether a value is a number above 0, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300  # false for NaN too


def no_numbers(scaling: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a scaling whose values are not the numbers that it is computed with, each with what was expected.

    A value of null says nothing. Those of a long rope are held against one another elsewhere.
    """
    if scaling_kind(scaling) in LONG_ROPE:
        return {}
    said = {key: scaling[key] for key in (*_ABOVE_0, *_OF_0_OR_MORE) if scaling.get(key) is not None}
    return {
        key: f"a number {'greater than 0' if key in _ABOVE_0 else 'of 0 or more'}"
        for key, value in said.items()
        if not is_factor(value) and not (key in _OF_0_OR_MORE and value == 0 and not isinstance(value, bool))
    }


def rotary_scaling(config: Mapping[str, Any], file: str) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Return `rope_scaling` or its equivalent from transformers 5's `rope_parameters`, and what is wrong with them.

    None where nothing is scaled. A key that is null, and an object that is empty, are none, as in transformers. What a file says in
    both styles must be the same: transformers 5 would take the first, and other readers of the file the second.
    """
    found, problems = {}, []
    for style in _STYLES:
        said = config.get(style)
        # A model with sliding and full layers has parameters for each kind; only those of full layers can be scaled.
        full = said.get("full_attention", said) if isinstance(said, Mapping) else said
        if not isinstance(full, Mapping | None):
            problems.append(Problem(f"{file}: {style}", repr(said), "null or an object"))
        elif scaling := {key: value for key, value in (full or {}).items() if value is not None and key not in _BESIDE}:
            found[style] = scaling
    for style, scaling in found.items():
        if both := two_kinds(scaling):
            remedy = "Leave the one that the model was made with: transformers goes by rope_type, TensorRT-LLM by type"
            problems.append(Problem(f"{file}: {style}", both, "one kind of scaling", remedy))
        problems += [Problem(f"{file}: {style}.{key}", repr(scaling[key]), it) for key, it in no_numbers(scaling).items()]
    old, new = (found.get(style) for style in _STYLES)
    if old is not None and new is not None and _plain(old) != _plain(new):
        remedy = "Leave the one that the model was made with: readers of the file differ in which they take"
        problems.append(Problem(f"{file}: rope_scaling", str(old), f"what rope_parameters says, {new}", remedy))
    if old is None and new is not None and scaling_kind(new) == "default":
        return None, problems
    return old or new, problems


def two_values(values: Mapping[str, Any], file: str) -> list[Problem]:
    """Return the problem of a setting that a configuration has by several keys, with several values.

    `values`: by each of its keys that has one. transformers 4 goes by the outer key, transformers 5 by the one in an object.
    """
    (first, meant), *others = values.items() or [("", None)]
    remedy = "Leave the one that the model was made with: readers of the file differ in which they take"
    problems = [Problem(f"{file}: {key}", repr(it), f"{meant!r}, as {first} says", remedy) for key, it in others if it != meant]
    return problems[:1]


def yarn_factor(factor: float, scale: float) -> float:
    """Return yarn's factor of rotated values for one of its scales (`mscale`, `mscale_all_dim`)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _plain(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling whose kind has one key and one name, so that two styles can be compared."""
    kind = scaling_kind(scaling)
    return {**{key: value for key, value in scaling.items() if key not in _KINDS}, "kind": _SAME.get(kind, kind)}
