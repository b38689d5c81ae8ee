"""Recognize the packed formats of quantized sources, module by module, and give their weights as numbers.

Facts: docs/format/quantized-layouts.md, sections 5 to 7, 9b and 9c, written down here anew and by no code of stages/quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import BadInput, Problem
from pipeline.tensor.tensors import LazyTensor
from stages.verify.roundtrip.original.bitsandbytes import STATE, EightBitNumbers, FourBitNumbers
from stages.verify.roundtrip.original.codes import LastBlock
from stages.verify.roundtrip.original.eetq import PARAMETERS as EETQ
from stages.verify.roundtrip.original.eetq import EetqNumbers
from stages.verify.roundtrip.original.grouped import grouped_numbers
from stages.verify.roundtrip.original.hqq import TALK, HqqNumbers
from stages.verify.roundtrip.original.numbers import GgufNumbers, Numbers, StoredNumbers
from stages.verify.roundtrip.original.scaled import scaled_numbers
from stages.verify.roundtrip.original.small_floats import by_tile, float4_numbers, tile_numbers
from stages.verify.roundtrip.original.words import PackedWords
from stages.verify.values import is_float

GGUF = "gguf_"
# Parameters beside the weights of a quantized source: of activations and of the cache.
BESIDE = (
    *(
        "activation_scale",
        "input_scale",
        "input_scale_ub",
        "input_global_scale",
        "input_zero_point",
        "output_scale",
        "output_zero_point",
    ),
    *("q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "prob_output_scale", "k_zero_point", "v_zero_point"),
)
# The parameters that a format computes its numbers with.
GROUPED = ("qweight", "qzeros", "scales", "g_idx")
WORDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
SCALED = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx", "pre_quant_scale")
TILES = ("weight", "weight_scale_inv", "weight_scale")
FLOAT4 = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "pre_quant_scale")


def unpack(
    module: str, parameters: Mapping[str, LazyTensor], settings: Mapping[str, Any], last_block: LastBlock
) -> dict[str, Numbers]:
    """Give a module's parameters as numbers by name: its packed weight as `weight`, and the parameters that are not packed.

    `settings`: the source's quantization_config, as it is for the module. `last_block`: keeps the block that was unpacked last.
    Raises BadInput naming the module's tensor that no format explains.
    """
    unpacked = {name: tensor for name, tensor in parameters.items() if name not in BESIDE}
    packed: Numbers | None = None
    kind = next((name for name in unpacked if name.startswith(GGUF)), None)
    if kind:
        packed = GgufNumbers(unpacked.pop(kind), kind=kind.removeprefix(GGUF))
    elif any(name.startswith(STATE) for name in unpacked):
        packed = FourBitNumbers(module, _take(unpacked, tuple(name for name in unpacked if name.startswith("weight"))))
    elif "W_q" in unpacked:
        packed = HqqNumbers(module, _take(unpacked, ("W_q", "scale", "zero", "shape", *TALK)))
    elif "weight_scales" in unpacked:
        packed = EetqNumbers(module, _take(unpacked, EETQ))
    elif "SCB" in unpacked:
        packed = EightBitNumbers(_take(unpacked, ("weight", "SCB", "weight_format")))
    elif _is_float4(unpacked):
        packed = float4_numbers(module, _take(unpacked, FLOAT4))
    elif "weight_scale_inv" in unpacked or _is_tiled(unpacked):
        packed = tile_numbers(module, _take(unpacked, TILES), settings)
    elif {"qweight", "scales"} <= unpacked.keys():
        packed = grouped_numbers(module, _take(unpacked, GROUPED), settings, last_block)
    elif "weight_packed" in unpacked:
        packed = PackedWords(module, _take(unpacked, WORDS), settings)
    elif {"weight", "weight_scale"} <= unpacked.keys():
        packed = scaled_numbers(module, _take(unpacked, SCALED))
    numbers: dict[str, Numbers] = {name: StoredNumbers(tensor) for name, tensor in unpacked.items()}
    for name, tensor in unpacked.items():
        if not is_float(tensor.dtype):
            found = f"values of type {tensor.dtype}, {list(tensor.shape)}, beside {', '.join(sorted(parameters))}"
            raise BadInput([Problem(f"{module}.{name}", found, "numbers, or a packed format that headrace reads")])
    return numbers if packed is None else {**numbers, "weight": packed}


def _is_float4(parameters: Mapping[str, LazyTensor]) -> bool:
    """Whether a weight of bytes has scales of a byte."""
    weight, scale = parameters.get("weight_packed", parameters.get("weight")), parameters.get("weight_scale")
    return weight is not None and scale is not None and weight.dtype.name == "uint8" and scale.dtype.itemsize == 1


def _is_tiled(parameters: Mapping[str, LazyTensor]) -> bool:
    weight, scale = parameters.get("weight"), parameters.get("weight_scale")
    return weight is not None and scale is not None and weight.dtype.name == "float8_e4m3fn" and by_tile(weight, scale)


def _take(parameters: dict[str, LazyTensor], names: tuple[str, ...]) -> dict[str, LazyTensor]:
    """Move the parameters of some names out of `parameters`."""
    return {name: parameters.pop(name) for name in names if name in parameters}
