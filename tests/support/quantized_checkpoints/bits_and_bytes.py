"""bitsandbytes, of 4 and 8 bits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.support.quantized_checkpoints.base import Arrays, Format, Packed

# The quantiles of a normal distribution that nf4's codes stand for, and fp4's floats of two bits of exponent.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
FP4 = [0.0, 0.0052083, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]


def bitsandbytes(*, kind: str = "nf4", nested: bool = False, block: int = 64) -> Format:
    """4 bits, whose runs of in-features have a scale each; `nested`: these are codes themselves."""
    table = np.array(NF4 if kind == "nf4" else [*FP4, *(-value for value in FP4)], np.float32)
    inner = np.linspace(-1, 1, 256, dtype=np.float32)

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        runs = weight.reshape(-1, block)
        scales = np.abs(runs).max(axis=1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": list(weight.shape)}
        parameters: Arrays = {"weight.quant_map": table}
        if nested:
            offset = float(scales.mean())
            shifted = scales - np.float32(offset)
            largest = np.array([np.abs(shifted[first : first + 256]).max() for first in range(0, len(shifted), 256)], np.float32)
            spread = np.repeat(largest, 256)[: len(shifted)]
            chosen = np.abs((shifted / np.maximum(spread, 1e-12))[:, None] - inner).argmin(axis=1).astype(np.uint8)
            scales = inner[chosen] * spread + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parameters |= {"weight.absmax": chosen, "weight.nested_absmax": largest, "weight.nested_quant_map": inner}
        else:
            parameters["weight.absmax"] = scales
        codes = np.abs((runs / scales[:, None])[..., None] - table).argmin(axis=-1).reshape(weight.shape)
        flat = codes.reshape(-1)
        parameters["weight"] = ((flat[0::2] << 4) | flat[1::2]).astype(np.uint8).reshape(-1, 1)
        parameters[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        stands_for = (table[codes].reshape(-1, block) * scales[:, None]).reshape(weight.shape).astype(np.float32)
        return Packed(parameters, stands_for)

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Format(quantize, {**settings, "bnb_4bit_use_double_quant": nested}, "")


def bitsandbytes_int8() -> Format:
    """LLM.int8: a row's largest magnitude beside its codes."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        largest = np.abs(weight).max(axis=1).astype(np.float32)
        codes = np.rint(weight * (127 / largest)[:, None]).astype(np.int8)
        stands_for = codes.astype(np.float32) * largest[:, None] / np.float32(127)
        return Packed({"weight": codes, "SCB": largest, "weight_format": np.zeros((), np.uint8)}, stands_for)

    return Format(quantize, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, "")
