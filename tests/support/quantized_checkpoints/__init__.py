"""Tiny quantized Hugging Face checkpoints of every kind, written from the formats' descriptions and by none of headrace's code.

Each quantizer makes of a weight [out, in] the parameters that its format stores and the float32 weight that these stand for.
"""

from __future__ import annotations

from tests.support.quantized_checkpoints.base import (
    BF16,
    FP8,
    FP16,
    LINEAR,
    LLAMA,
    MIXTRAL,
    PLACES,
    Arrays,
    Format,
    Packed,
    Quantizer,
    described,
    linear,
    quantized,
    values,
    write,
    write_float,
)
from tests.support.quantized_checkpoints.bits_and_bytes import bitsandbytes, bitsandbytes_int8
from tests.support.quantized_checkpoints.compressed_tensors import compressed, compressed_int8, scheme
from tests.support.quantized_checkpoints.eetq_order import eetq, order_a
from tests.support.quantized_checkpoints.every import USUAL, VARIANTS, formats
from tests.support.quantized_checkpoints.floats4 import E2M1, float4, mxfp4, nvfp4, pairs
from tests.support.quantized_checkpoints.floats8 import (
    block_float8,
    by_tile,
    compressed_float8,
    fbgemm,
    float8,
    gptqmodel_float8,
    modelopt_block_float8,
    modelopt_float8,
    mxfp8,
)
from tests.support.quantized_checkpoints.groups import ITSELF, auto_round, awq, gptq, grouped, numbers, packed32, planes32
from tests.support.quantized_checkpoints.half_quadratic import hqq
from tests.support.quantized_checkpoints.mixtures import each_its_own, mixed_precision, own
from tests.support.quantized_checkpoints.modelopt_int4 import modelopt_awq

__all__ = [
    "BF16",
    "E2M1",
    "FP8",
    "FP16",
    "ITSELF",
    "LINEAR",
    "LLAMA",
    "MIXTRAL",
    "PLACES",
    "USUAL",
    "VARIANTS",
    "Arrays",
    "Format",
    "Packed",
    "Quantizer",
    "auto_round",
    "awq",
    "bitsandbytes",
    "bitsandbytes_int8",
    "block_float8",
    "by_tile",
    "compressed",
    "compressed_float8",
    "compressed_int8",
    "described",
    "each_its_own",
    "eetq",
    "fbgemm",
    "float4",
    "float8",
    "formats",
    "gptq",
    "gptqmodel_float8",
    "grouped",
    "hqq",
    "linear",
    "mixed_precision",
    "modelopt_awq",
    "modelopt_block_float8",
    "modelopt_float8",
    "mxfp4",
    "mxfp8",
    "numbers",
    "nvfp4",
    "order_a",
    "own",
    "packed32",
    "pairs",
    "planes32",
    "quantized",
    "scheme",
    "values",
    "write",
    "write_float",
]
