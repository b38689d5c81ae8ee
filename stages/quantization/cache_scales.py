"""Scales of an FP8 key-value cache, under all names that quantizers give them, on modules that are quantized or not.

ModelOpt: k_proj.k_scale and v_proj.v_scale. llm-compressor: k_scale and v_scale of the attention module; before autumn 2024
k_proj.output_scale and v_proj.output_scale. AutoFP8: kv_scale of the attention module, for both.
Facts: docs/format/quantized-layouts.md, section 12.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import Problem
from pipeline.tensor.tensors import LazyTensor
from stages.quantization.packed_format import OF_ALL, PackedParameter
from stages.quantization.targets.fp8 import as_scale, largest

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

T = TypeVar("T")
_QUERIES = "queries and attention weights are not quantized"
_FP8 = ("FP8", "STATIC")  # ModelOpt's word and AutoFP8's
_POINTS = "an FP8 cache has no zero points"
PARAMETERS: Mapping[str, PackedParameter] = {
    **{name: PackedParameter(OF_ALL, becomes="kv_scale") for name in ("k_scale", "v_scale", "kv_scale", "output_scale")},
    **{name: PackedParameter(OF_ALL, dropped=_QUERIES) for name in ("q_scale", "prob_scale", "prob_output_scale")},
    **{name: PackedParameter(OF_ALL, dropped=_POINTS) for name in ("k_zero_point", "v_zero_point", "output_zero_point")},
}
PAIRS = {"k_scale": "v_scale", "v_scale": "k_scale"}  # of an attention module, one of which says nothing without the other


def divided(parameters: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """A module's parameters beside the cache's, and the cache's."""
    ours = {name: value for name, value in parameters.items() if name in PARAMETERS}
    return {name: value for name, value in parameters.items() if name not in ours}, ours


def other_kind(settings: Mapping[str, Any]) -> str:
    """The kind of cache, other than FP8, that the settings say the scales are of; "" where they say FP8 or nothing.

    Only an FP8 code is worth amax / 448: those of integers and of 4-bit floats have other scales, under the same names.
    """
    scheme, named = settings.get("kv_cache_scheme"), settings.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        kind, bits = scheme.get("type"), scheme.get("num_bits")
        if kind == "int":
            return "integers"
        if kind not in (None, "float") or bits not in (None, 8):
            return f"{bits or 'other'}-bit {kind or 'float'}s"
    words = [str(each) for each in (named, scheme) if each and not isinstance(each, Mapping)]
    return next((word for word in words if not word.upper().startswith(_FP8)), "")


def check(module: str, scales: Mapping[str, LazyTensor], alone: bool) -> list[Problem]:
    """Refuse scales that are not one, and one of a pair. `alone`: the module has no other parameters, as an attention module."""
    problems = [
        Problem(f"{module}.{name}", f"shape {list(tensor.shape)}", "one scale")
        for name, tensor in scales.items()
        if PARAMETERS[name].becomes and math.prod(tensor.shape) != 1
    ]
    missing = next((PAIRS[name] for name in scales if name in PAIRS and PAIRS[name] not in scales), "")
    if alone and missing and not problems:
        problems.append(Problem(f"{module}.{missing}", "no such tensor", f"one beside {PAIRS[missing]}"))
    return problems


def unpack(scales: Mapping[str, BlockArray], settings: Mapping[str, Any]) -> dict[str, BlockArray]:
    """`kv_scale`, float32 [1]: the largest of a module's scales. Nothing for a cache of another kind than FP8."""
    ours = [as_scale(array) for name, array in scales.items() if PARAMETERS[name].becomes]
    return {"kv_scale": largest(ours)} if ours and not other_kind(settings) else {}
