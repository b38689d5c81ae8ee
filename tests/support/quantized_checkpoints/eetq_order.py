"""EETQ, and the order of its kernels."""

from __future__ import annotations

import numpy as np

from tests.support.quantized_checkpoints.base import FP16, Format, Packed


def order_a(codes: np.ndarray) -> np.ndarray:
    """int8 [K, N] of unsigned codes [N, K], of 8 bits each: the bytes of the kernels' order, written from its closed form.

    Raises ValueError where that has no place for so many rows or columns.
    """
    (out, features), place = codes.shape, np.arange(16)
    if out % 2 or features % 64:
        raise ValueError(f"{out} x {features}")
    source = (place // 2 % 2) * 8 + place // 4 * 2 + place % 2
    permuted = codes.reshape(out, -1, 16)[:, :, source].reshape(out, features)
    n, k = np.arange(out)[:, None], np.arange(features)[None]
    stream = np.empty(out * features, np.uint8)
    stream[n // 2 * 2 * features + k // 64 * 128 + n % 2 * 64 + k % 64] = permuted
    return stream.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(features, out).view(np.int8)


def eetq(*, named: str = "weight") -> Format:
    """EETQ: int8 with a scale a row, in the order of its kernels; its own tools call the weight qweight."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        wide = (np.abs(weight).max(axis=1, keepdims=True) / 128).astype(np.float32)
        codes = np.clip(np.copysign(np.floor(np.abs(weight / wide) + 0.5), weight), -128, 127).astype(np.int32)
        scales = wide.astype(FP16)
        parameters = {named: order_a((codes + 128).astype(np.uint8)), "weight_scales": scales[:, 0]}
        return Packed(parameters, codes.astype(np.float32) * scales.astype(np.float32))

    return Format(quantize, {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}, "W8A16")
