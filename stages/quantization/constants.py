"""The small arrays of a layer that no linear owns: the clamps of activations in FP8 by row, and the scale of an 8-bit cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pipeline.model.quantization import FP8_ROWWISE, Quantization
from pipeline.tensor.derived import constant, derive
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Region
from pipeline.tensor.tensors import Y_RANGE, Block
from stages.quantization.entries import Entry, whole_entry
from stages.quantization.finite import finite
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
            array = _of_source(modules, name) or (None if qk_norm else _measured(modules, f"{base}.attention"))
            entries |= dict([whole_entry(name, layer, constant(str(name), (1.0,)) if array is None else array)])
    return entries


def _measured(modules: Modules, attention: str) -> BlockArray | None:
    """The scale of an FP8 cache by measured keys and values; None where these are not given."""
    ranges = [modules.get(f"{attention}.qkv.{part}", {}).get(Y_RANGE) for part in ("k", "v")]
    held = [each for each in ranges if each is not None]
    return fp8_numbers.cache_scale(held) if len(held) == 2 else None


def _of_source(modules: Modules, name: TensorName) -> BlockArray | None:
    """The source's scale of an FP8 cache: the attention module's own, or the larger of the keys' and the values'; None without.

    `name`: the target's, for what is wrong with its value.
    """
    own = [modules.get(name.module, {}).get("kv_scale")]
    of_parts = [modules.get(f"{name.module}.qkv.{part}", {}).get("kv_scale") for part in ("k", "v")]
    # Both or neither: of one alone the reference takes no notice.
    found = own if own[0] is not None else of_parts
    inputs = {f"scale{number}": scale for number, scale in enumerate(found) if scale is not None}
    if len(inputs) < len(found):
        return None
    return derive("quantize", of_cache, inputs, shape=(1,), dtype=fp8.FLOAT32, name=str(name))


def of_cache(region: Region, name: str, **scales: Block) -> np.ndarray:
    """float32 [1]: the largest of some scales of a cache. Raises BadInput naming it where one is not finite."""
    values = np.stack([np.asarray(scale.read(region)) for scale in scales.values()])
    return np.asarray(finite(values, name, "Mend the checkpoint, or leave out --fp8_kv_cache").max(axis=0))
