"""compressed-tensors' integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.quantized_checkpoints.base import BF16, Format, Packed
from tests.support.quantized_checkpoints.groups import grouped, numbers, packed32


def compressed(
    *, bits: int = 4, group: int = 64, sym: bool = True, dtype: np.dtype = BF16, order: bool = False, unpacked: bool = False
) -> Format:
    """compressed-tensors' pack-quantized format; `group` -1: one scale a row.

    `order`: groups follow the activations. `unpacked`: zero points are bytes, as in older files.
    """
    random = np.random.default_rng(7)

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        features = weight.shape[1]
        size = features if group == -1 else group
        places = random.permutation(features) if order else np.arange(features)
        arranged, zeros, scales = grouped(weight[:, places], bits, size, sym, dtype)
        codes, groups = np.empty_like(arranged), np.empty(features, dtype=np.int32)
        codes[:, places], groups[places] = arranged, np.arange(features) // size
        points = (zeros - (1 << (bits - 1))).astype(np.int8) if unpacked else packed32(zeros, bits, 0)
        parameters = {
            "weight_packed": packed32(codes, bits, 1),
            "weight_scale": scales,
            "weight_shape": np.array(weight.shape, dtype=np.int64),
            **({} if sym else {"weight_zero_point": points}),
            **({"weight_g_idx": groups} if order else {}),
        }
        return Packed(parameters, numbers(codes, zeros, scales, groups))

    strategy = {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, **strategy, "symmetric": sym, "type": "int", "actorder": "group" if order else None}
    return Format(quantize, scheme("pack-quantized", weights, None), f"W{bits}A16{'' if group == -1 and sym else '_GPTQ'}")


def compressed_int8(
    *, dtype: np.dtype = BF16, static: bool = False, sym: bool = True, zeros: bool = False, bits: int = 8, group: int = -1
) -> Format:
    """compressed-tensors' int-quantized format: W8A8 (or W4A8) with a scale a row, whose activations are quantized as they come.

    `static`: activations have one scale, and a zero point. `sym`: weights have no zero points; `zeros`: they have some of 0.
    """

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        size, middle = weight.shape[1] if group == -1 else group, 1 << (bits - 1)
        codes, points, scales = grouped(weight, bits, size, sym, dtype)
        parameters = {
            "weight": (codes - middle).astype(np.int8),
            "weight_scale": scales,
            **({} if sym and not zeros else {"weight_zero_point": (points - middle).astype(np.int8)}),
            **({"input_scale": np.array([0.02], dtype), "input_zero_point": np.array([3], np.int8)} if static else {}),
        }
        return Packed(parameters, numbers(codes, points, scales))

    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, **strategy, "symmetric": sym, "type": "int"}
    inputs = {"num_bits": 8, "strategy": "tensor" if static else "token", "symmetric": not static, "type": "int"}
    algorithm = f"W{bits}A16{'' if group == -1 and sym else '_GPTQ'}"
    return Format(quantize, scheme("int-quantized", weights, {**inputs, "dynamic": not static}), algorithm)


def scheme(name: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
