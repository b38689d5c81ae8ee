"""Hold a long rope's parameters against what TensorRT-LLM's Phi class reads and computes of them.

The class reads two lists of factors and the original length, and computes the factor of rotated values of the lengths alone; that
of Phi-3.5-MoE is given two such factors instead. Facts: docs/format/runtime-1.2.md, sections b3 and f.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import Problem
from pipeline.model.model_config import ModelConfig
from pipeline.model.rotary import is_factor
from pipeline.model.runtime import runtime

LENGTH = "original_max_position_embeddings"
_LISTS = ("short_factor", "long_factor")
_SCALES = ("short_mscale", "long_mscale")  # of a mixture of experts
_ADD = "Add the key, as the model was trained with it"


def reads_long_rope(model: ModelConfig) -> bool:
    """Whether a model has a long rope, and TensorRT-LLM's class of it reads one."""
    own = runtime().classes.get(model.architecture)
    return bool(model.long_rope and own and own.long_rope)


def usual_length(model: ModelConfig) -> int:
    """Return the original length that transformers takes for one that is missing: its class's own, or the model's longest."""
    return int(model.settings.get("usual_positions") or model.max_position_embeddings)


def check_long_rope(model: ModelConfig, file: str) -> list[Problem]:
    """Return the problems of a long rope that TensorRT-LLM's class would compute otherwise, or that lacks what it reads."""
    return list(_problems(model, model.long_rope, file)) if reads_long_rope(model) else []


def _problems(model: ModelConfig, scaling: Mapping[str, Any], file: str) -> Iterator[Problem]:
    count = model.rotary_embedding_dim // 2
    for key in _LISTS:
        factors = scaling.get(key)
        if not isinstance(factors, list) or len(factors) != count or not all(map(is_factor, factors)):
            told = f"{len(factors)} factors" if isinstance(factors, list) else repr(factors)
            found = "long rope without it" if factors is None else told
            expected = f"a list of {count} factors above 0, one for each pair of features that are turned"
            yield Problem(f"{file}: rope_scaling.{key}", found, expected, _ADD)
    for key in _SCALES if model.num_experts else ():
        if not is_factor(scaling.get(key)):
            yield Problem(f"{file}: rope_scaling.{key}", repr(scaling.get(key)), "a number above 0, which the class reads", _ADD)
    trained = scaling.get(LENGTH, usual_length(model))
    if isinstance(trained, bool) or not isinstance(trained, int) or trained < 2:
        yield Problem(f"{file}: {LENGTH}", repr(trained), "a whole number of 2 or more")
        return
    yield from _lengths(model, file)
    if not model.num_experts:
        yield from _factors(scaling, trained, model.max_position_embeddings, file)


def _lengths(model: ModelConfig, file: str) -> Iterator[Problem]:
    """An original length that transformers does not take: it has one place for Phi-3, and another for Phi-3.5-MoE."""
    inside, beside = (model.rotary_scaling or {}).get(LENGTH), model.settings.get("original_positions")
    if inside is None and beside is not None and model.num_experts and beside != model.max_position_embeddings:
        expected = f"it inside rope_scaling: beside it, transformers takes {model.max_position_embeddings} instead"
        yield Problem(f"{file}: {LENGTH}", str(beside), expected, "Say it inside")
    taken = beside if beside is not None else model.settings.get("usual_positions")
    if inside is not None and taken is not None and inside != taken:
        expected = (
            f"{taken}, which {'the configuration says beside it' if beside is not None else 'transformers takes in any case'}"
        )
        remedy = f"Say the same {LENGTH} inside and beside rope_scaling"
        yield Problem(f"{file}: rope_scaling.{LENGTH}", str(inside), expected, remedy)


def _factors(scaling: Mapping[str, Any], trained: int, longest: int, file: str) -> Iterator[Problem]:
    """A factor of rotated values other than the one that the lengths give, told by itself or by a growth of its own."""
    computed = _magnitude(longest / trained, trained)
    for key, meant in (("attention_factor", float), ("factor", lambda growth: _magnitude(growth, trained))):
        told = scaling.get(key)
        if told is None:
            continue
        if not is_factor(told) or not math.isclose(meant(told), computed, rel_tol=1e-5):
            growth = f" ({longest} / {trained} of factor)" if key == "factor" else ""
            expected = f"{computed:g} times what is turned{growth}: TensorRT-LLM's class computes it of the lengths"
            remedy = "Without rope scaling (--rope_scaling none) the model is computed up to the original length only"
            yield Problem(f"{file}: rope_scaling.{key}", repr(told), expected, remedy)
        return  # transformers takes the first that is there


def _magnitude(growth: float, trained: int) -> float:
    return math.sqrt(1 + math.log(growth) / math.log(trained)) if growth > 1 else 1.0
