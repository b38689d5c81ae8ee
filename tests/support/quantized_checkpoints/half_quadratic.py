"""HQQ."""

from __future__ import annotations

import numpy as np

from tests.support.quantized_checkpoints.base import FP16, Format, Packed


def hqq(*, bits: int = 4, group: int = 64, axis: int = 1) -> Format:
    """HQQ of groups along the in-features (axis 1) or across them: a byte holds codes of rows of groups that are far apart."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        runs, top = weight.reshape((-1, group) if axis else (group, -1)), (1 << bits) - 1
        low, high = (getattr(runs, each)(axis=axis, keepdims=True) for each in ("min", "max"))
        scale = ((high - low) / top).astype(FP16)
        zero = (-low / scale.astype(np.float32)).astype(FP16)
        wide, offset = scale.astype(np.float32), zero.astype(np.float32)
        codes = np.clip(np.rint(runs / wide + offset), 0, top).astype(np.uint8)
        parts = np.split(codes, 8 // bits)
        joined = sum(part.astype(np.uint32) << (8 - bits * (n + 1)) for n, part in enumerate(parts))
        parameters = {
            "W_q": np.asarray(joined).astype(np.uint8),
            "scale": scale,
            "zero": zero,
            "shape": np.array(weight.shape, np.int64),
            **{name: np.array(value, np.int32) for name, value in (("nbits", bits), ("group_size", group), ("axis", axis))},
            "packing": np.frombuffer(f"{bits}bit_u8".encode(), np.uint8),
            "view_as_float": np.zeros((), np.uint8),
        }
        return Packed(parameters, ((codes.astype(np.float32) - offset) * wide).reshape(weight.shape))

    config = {"weight_quant_params": {"nbits": bits, "group_size": group, "axis": axis}}
    return Format(quantize, {"quant_method": "hqq", "quant_config": config}, "")
