"""The small arrays of a layer that no linear owns: the clamps of activations in FP8 by row, and the scale of an 8-bit cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.model.quantization import FP8_ROWWISE, Quantization
from pipeline.tensor.derived import constant
from pipeline.tensor.names import TensorName
from pipeline.tensor.tensors import Y_RANGE
from stages.quantization.entries import Entry, whole_entry
from stages.quantization.targets import fp8, fp8_numbers, smoothquant

if TYPE_CHECKING:
    from pipeline.tensor.arrays import BlockArray

Modules = Mapping[str, Mapping[str, "BlockArray"]]


def constants(modules: Modules, quantization: Quantization, layers: int, qk_norm: bool) -> dict[TensorName, Entry]:
    """Those of all layers. `modules`: canonical parameters by renamed module. `qk_norm`: the cached keys are normed ones, and not
    k_proj's outputs, of which the ranges are.
    """
    entries: dict[TensorName, Entry] = {}
    names: list[str] = []
    if quantization.algorithm == FP8_ROWWISE:
        names = ["mlp", "post_layernorm", *(() if quantization.meta_recipe else ("attention", "input_layernorm"))]
    for layer in range(layers):
        base = f"transformer.layers.{layer}"
        if not (quantization.meta_recipe and layer in (0, layers - 1)):
            bounds = (-quantization.clamp, quantization.clamp)
            entries |= dict(
                whole_entry(TensorName(f"{base}.{name}", "clamp_val"), layer, constant(f"{base}.{name}.clamp_val", bounds))
                for name in names
                if not quantization.excludes(f"{base}.{name}")
            )
        name = TensorName(f"{base}.attention", "kv_cache_scaling_factor")
        if quantization.int8_kv_cache:
            outputs = [modules[f"{base}.attention.qkv.{part}"][Y_RANGE] for part in "qkv"]
            entries |= dict([whole_entry(name, layer, smoothquant.cache_scale(outputs))])
        elif quantization.fp8_kv_cache:
            array = _of_source(modules, f"{base}.attention") or (None if qk_norm else _measured(modules, f"{base}.attention"))
            entries |= dict([whole_entry(name, layer, constant(str(name), (1.0,)) if array is None else array)])
    return entries


def _measured(modules: Modules, attention: str) -> BlockArray | None:
    """The scale of an FP8 cache by measured keys and values; None where these are not given."""
    ranges = [modules.get(f"{attention}.qkv.{part}", {}).get(Y_RANGE) for part in ("k", "v")]
    held = [each for each in ranges if each is not None]
    return fp8_numbers.cache_scale(held) if len(held) == 2 else None


def _of_source(modules: Modules, attention: str) -> BlockArray | None:
    """The source's scale of an FP8 cache: the attention module's own, or the larger of the keys' and the values'; None without."""
    if "kv_scale" in modules.get(attention, {}):
        return modules[attention]["kv_scale"]
    of_parts = [modules.get(f"{attention}.qkv.{part}", {}).get("kv_scale") for part in ("k", "v")]
    scales = [scale for scale in of_parts if scale is not None]
    # Both or neither: of one alone the reference takes no notice.
    return fp8.largest(scales) if len(scales) == 2 else None
