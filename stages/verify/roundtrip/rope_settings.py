"""Compare what config.json says of rotary positions with the source's own configuration.

A key that is missing has the value that its reader takes: TensorRT-LLM's class for config.json, transformers for the source.
Facts: docs/format/runtime-1.2.md, sections b to b4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import Problem
from stages.verify.contract.reader import is_number

AGAIN = "Convert it again"
LONG_ROPE = ("longrope", "su")
LENGTH = "original_max_position_embeddings"
NAMES = ("type", "rope_type", "rope_theta", "partial_rotary_factor")  # of no scaling, or its kind
# What TensorRT-LLM's class has for keys of a scaling that are missing.
OF_CLASS: Mapping[str, Mapping[str, float]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 8192},
    "yarn": {"beta_fast": 32, "beta_slow": 1, LENGTH: 4096},
}
# What transformers has; of an original length it takes the model's own.
OF_SOURCE: Mapping[str, Mapping[str, float]] = {"yarn": {"beta_fast": 32, "beta_slow": 1}}
# What makes the one factor of rotated values, in which the two readers differ: compared as that.
OF_MAGNITUDE = ("mscale", "mscale_all_dim", "attention_factor")
USUAL_LENGTH = 4096  # of a long rope of Phi-3's in transformers; other models take their own
# The bases of models whose configuration class in transformers has another than LLaMA's.
BASES = {
    "MixtralForCausalLM": 1e6,
    "ArcticForCausalLM": 1e6,
    "PhiMoEForCausalLM": 1e6,
    "Gemma3ForCausalLM": 1e6,
    "Qwen2VLForConditionalGeneration": 1e6,
}
BASE = 10000.0


def check_rope(config: Mapping[str, Any], source: Mapping[str, Any], without: bool) -> Iterator[Problem]:
    """Report what config.json says of positions that is not the source's. `without`: scaling was left out on request."""
    if not without:
        yield from _scaling_problems(config, source)
    theirs = scaling_of(source)
    base = theirs.get("rope_theta", _parameters(source).get("rope_theta", source.get("rope_theta")))
    base = BASES.get(str(config.get("architecture")), BASE) if base is None else base
    found = config.get("rotary_base", BASE)
    if is_number(base) and is_number(found) and not math.isclose(base, found):
        yield Problem("config.json: rotary_base", repr(found), f"{base!r}, by the source's rope_theta", AGAIN)


def scaling_of(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """A source's scaling of positions, in either style of config.json; empty where there is none."""
    scaling = source.get("rope_scaling")
    return scaling if isinstance(scaling, Mapping) and scaling else _parameters(source)


def _scaling_problems(config: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[Problem]:
    theirs, ours = scaling_of(source), config.get("rotary_scaling") or {}
    kind, written = _kind(theirs), _kind(ours)
    if kind in LONG_ROPE and config.get("position_embedding_type") == "long_rope":
        yield from _long_rope(config, source, theirs)
        return
    if kind != written:
        yield Problem("config.json: rotary_scaling", written, f"{kind}, by the source's rope_scaling", AGAIN)
        return
    length = {LENGTH: source.get(LENGTH) or source.get("max_position_embeddings")} if LENGTH in OF_CLASS.get(kind, ()) else {}
    meant = {**OF_SOURCE.get(kind, {}), **length, **_said(theirs)}
    read = {**OF_CLASS.get(kind, {}), **_said(ours)}
    known = {*OF_CLASS.get(kind, ()), "factor", "mrope_section"}
    for key in sorted((meant.keys() | read.keys()) & (known | (meant.keys() & read.keys())) - set(OF_MAGNITUDE)):
        if not same(meant.get(key), read.get(key)):
            found = f"{ours.get(key)!r}" if key in ours else f"none, which the class takes for {read.get(key)!r}"
            yield Problem(f"config.json: rotary_scaling.{key}", found, f"{meant.get(key)!r}, by the source", AGAIN)
    if kind == "yarn" and not same(*(magnitudes := (_magnitude_of_source(meant), _magnitude_of_class(read)))):
        expected, found = (f"{each:g} times what is turned" for each in magnitudes)
        yield Problem("config.json: rotary_scaling.mscale", found, f"{expected}, by the source", AGAIN)


def _long_rope(config: Mapping[str, Any], source: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Problem]:
    """Phi's two lists of factors, the length that they are of, and two factors of what is turned."""
    for key in ("short", "long"):
        if list(theirs.get(f"{key}_factor") or ()) != list(config.get(f"longrope_scaling_{key}_factors") or ()):
            yield Problem(f"config.json: longrope_scaling_{key}_factors", "others", f"the source's {key}_factor", AGAIN)
        meant, found = theirs.get(f"{key}_mscale"), config.get(f"longrope_{key}_mscale")
        if not same(meant, found) and (found is not None or config.get("architecture") == "PhiMoEForCausalLM"):
            yield Problem(f"config.json: longrope_{key}_mscale", repr(found), f"{meant!r}, by the source's {key}_mscale", AGAIN)
    usual = USUAL_LENGTH if config.get("architecture") == "Phi3ForCausalLM" else source.get("max_position_embeddings")
    lengths = [each for each in (theirs.get(LENGTH), source.get(LENGTH)) if each is not None] or [usual]
    if config.get(LENGTH) not in lengths:
        yield Problem(f"config.json: {LENGTH}", repr(config.get(LENGTH)), f"{lengths[0]!r}, by the source", AGAIN)


def _said(scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scaling.items() if key not in NAMES and value is not None}


def same(one: Any, other: Any) -> bool:
    """Whether two settings are the same: numbers but for a rounding."""
    if is_number(one) and is_number(other):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _magnitude_of_class(scaling: Mapping[str, Any]) -> float | None:
    """The factor by which TensorRT-LLM's class multiplies the values that it turns; None where that cannot be told."""
    return _ratio(scaling.get("factor"), scaling.get("mscale", 1.0), scaling.get("mscale_all_dim", 0.0))


def _magnitude_of_source(scaling: Mapping[str, Any]) -> float | None:
    """The factor by which transformers does: `attention_factor`, or that of both scales, or of neither."""
    if scaling.get("attention_factor") is not None:
        told = scaling["attention_factor"]
        return float(told) if is_number(told) else None
    both = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _ratio(scaling.get("factor"), *(both if all(both) else (1.0, 0.0)))


def _ratio(factor: Any, scale: Any, every: Any) -> float | None:
    if not all(map(is_number, (factor, scale, every))) or factor <= 1:
        return 1.0 if is_number(factor) else None
    growth = 0.1 * math.log(factor)
    return float((growth * scale + 1) / (growth * every + 1)) if growth * every != -1 else None


def _parameters(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5's `rope_parameters`, those of layers that see everything; empty where there are none."""
    parameters = source.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return {}
    full = parameters.get("full_attention", parameters)
    return full if isinstance(full, Mapping) else {}


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")
