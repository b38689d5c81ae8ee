"""Every format, and what varies inside it."""

from __future__ import annotations

import numpy as np

from tests.support.quantized_checkpoints.base import BF16, FP16, Format
from tests.support.quantized_checkpoints.bits_and_bytes import bitsandbytes, bitsandbytes_int8
from tests.support.quantized_checkpoints.compressed_tensors import compressed, compressed_int8
from tests.support.quantized_checkpoints.eetq_order import eetq
from tests.support.quantized_checkpoints.floats4 import mxfp4, nvfp4
from tests.support.quantized_checkpoints.floats8 import (
    block_float8,
    compressed_float8,
    fbgemm,
    gptqmodel_float8,
    modelopt_block_float8,
    modelopt_float8,
    mxfp8,
)
from tests.support.quantized_checkpoints.groups import auto_round, awq, gptq
from tests.support.quantized_checkpoints.half_quadratic import hqq
from tests.support.quantized_checkpoints.modelopt_int4 import modelopt_awq


def formats() -> dict[str, Format]:
    """Every format, and what varies inside it."""
    return {
        "gptq": gptq(),
        "gptq asymmetric": gptq(sym=False),
        "gptq v2": gptq(sym=False, second=True),
        "gptq v2 zeros in v1": gptq(second=True, said=False),
        "gptq without g_idx": gptq(index="none", beside=True),
        "gptq bf16 scales": gptq(dtype=BF16, sym=False),
        "gptq zero biases": gptq(bias=True),
        "gptq groups of 128": gptq(group=128),
        "gptq 8 bits": gptq(bits=8),
        "gptq 8 bits asymmetric": gptq(bits=8, sym=False),
        "gptq 3 bits": gptq(bits=3),
        "gptq 3 bits asymmetric": gptq(bits=3, sym=False),
        "gptq 2 bits": gptq(bits=2, sym=False, second=True),
        "gptq 3 bits a row": gptq(bits=3, group=-1),
        "gptq planar 3 bits": gptq(bits=3, sym=False, planar=True),
        "gptq planar 4 bits": gptq(sym=False, planar=True),
        "gptq planar 5 bits": gptq(bits=5, planar=True),
        "gptq planar 6 bits a row": gptq(bits=6, group=-1, planar=True),
        "gptq planar 7 bits": gptq(bits=7, sym=False, planar=True),
        "gptq a row": gptq(group=-1, index="order"),
        "gptq 8 bits a row": gptq(bits=8, group=-1),
        "awq": awq(),
        "awq without zero points": awq(zero_point=False),
        "awq without qzeros": awq(zero_point=False, stored=False),
        "awq symmetric a row": awq(group=-1, sym=True),
        "auto-round": auto_round(),
        "auto-round as gptq": auto_round(packing="auto_round:auto_gptq"),
        "auto-round as gptqmodel, 8 bits": auto_round(packing="auto_round:gptqmodel", bits=8),
        "auto-round symmetric, older": auto_round(packing="auto_round:gptq:exllamav2", sym=True, older=True),
        "auto-round older": auto_round(packing="autoround:exllamav2", older=True),
        "auto-round of either sign": auto_round(packing="auto_round:auto_gptq", sym=True, signs=True),
        "auto-round of either sign, 8 bits": auto_round(packing="auto_round:auto_gptq", bits=8, sym=True, signs=True),
        "auto-round as awq": auto_round(packing="auto_round:auto_awq"),
        "compressed w4a16": compressed(),
        "compressed w4a16 asymmetric": compressed(sym=False, dtype=FP16),
        "compressed w8a16": compressed(bits=8),
        "compressed w4a16 a row": compressed(group=-1),
        "compressed w8a16 a row": compressed(bits=8, group=-1),
        "compressed w4a16 zeros of bytes": compressed(sym=False, unpacked=True),
        "compressed w8a8": compressed_int8(),
        "compressed w8a8 static": compressed_int8(static=True, zeros=True, dtype=np.dtype(np.float32)),
        "compressed w8a16 int8 groups": compressed_int8(group=64),
        "compressed w4a8": compressed_int8(bits=4, group=64),
        "compressed fp8": compressed_float8(dynamic=False),
        "compressed fp8 dynamic": compressed_float8(dynamic=True),
        "compressed fp8 a row, static": compressed_float8(dynamic=False, rows=True),
        "modelopt fp8": modelopt_float8(),
        "modelopt awq": modelopt_awq(),
        "fbgemm": fbgemm(),
        "fp8 block": block_float8(),
        "fp8 block of 96": block_float8(tile=96, dtype=np.dtype(np.float32)),
        "compressed fp8 block": block_float8(compressed_=True),
        "modelopt fp8 block": modelopt_block_float8(),
        "gptqmodel fp8 block": gptqmodel_float8(method="block"),
        "gptqmodel fp8 a row": gptqmodel_float8(method="row"),
        "gptqmodel fp8": gptqmodel_float8(method="tensor"),
        "mxfp8": mxfp8(),
        "mxfp8 of exponents": mxfp8(exponents="float8_e8m0fnu"),
        "nvfp4": nvfp4(),
        "nvfp4 cache": nvfp4(cache=True),
        "nvfp4 scales apart": nvfp4(alike=False),
        "nvfp4 weights alone": nvfp4(inputs=False),
        "compressed nvfp4": nvfp4(compressed_=True),
        "mxfp4": mxfp4(),
        "bitsandbytes nf4": bitsandbytes(),
        "bitsandbytes nf4 nested": bitsandbytes(nested=True),
        "bitsandbytes fp4": bitsandbytes(kind="fp4", block=128),
        "bitsandbytes int8": bitsandbytes_int8(),
        "hqq": hqq(),
        "hqq 2 bits": hqq(bits=2, group=32),
        "hqq across": hqq(axis=0),
        "hqq across, 8 bits": hqq(bits=8, group=32, axis=0),
        "eetq": eetq(),
        "eetq of its own tools": eetq(named="qweight"),
        "mxfp4 of quark": mxfp4(named="weight", exponents="float8_e8m0fnu"),
    }


# By day one or two forms of each format are tried in sweeps over all of them.
USUAL = (
    "gptq",
    "gptq asymmetric",
    "gptq act-order",
    "gptq 8 bits",
    "gptq 3 bits",
    "gptq a row",
    "awq",
    "awq without zero points",
    "auto-round",
    "compressed w4a16",
    "compressed w8a8",
    "compressed fp8",
    "compressed fp8 dynamic",
    "modelopt fp8",
    "modelopt awq",
    "fbgemm",
    "fp8 block",
    "nvfp4",
    "mxfp4",
    "bitsandbytes nf4",
    "bitsandbytes int8",
    "hqq",
    "eetq",
)
VARIANTS = frozenset(formats()) - {*USUAL}
