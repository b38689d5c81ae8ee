"""4-bit floats: NVFP4 and MXFP4."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.quantized_checkpoints.base import FP8, Format, Packed
from tests.support.quantized_checkpoints.compressed_tensors import scheme

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)


def float4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest e2m1 of each value, as a code (sign, two bits of exponent, one of mantissa) and as a number."""
    nearest = np.abs(np.abs(values)[..., None] - E2M1).argmin(axis=-1)
    negative = np.signbit(values)
    return (nearest + 8 * negative).astype(np.uint8), np.where(negative, -E2M1[nearest], E2M1[nearest])


def pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes of consecutive in-features a byte, the first in the low half."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)


def nvfp4(*, compressed_: bool = False, cache: bool = False, alike: bool = True, inputs: bool = True) -> Format:
    """NVFP4 of ModelOpt, whose scale of all multiplies, or of compressed-tensors, whose divides.

    `alike`: the parts of a fused module have one scale of all, as both quantizers see to. `inputs`: activations have a scale.
    """

    def quantize(module: str, weight: np.ndarray) -> Packed:
        own = {"q_proj": 1.5, "k_proj": 1.0, "v_proj": 0.75}.get(module.rpartition(".")[2], 1.0)
        every = np.float32(2.0**-9 * (1 if alike else own))
        held = np.float32(1) / every if compressed_ else every
        every = np.float32(1) / held if compressed_ else every
        groups = weight.reshape(len(weight), -1, 16)
        scales = np.clip(np.abs(groups).max(axis=2) / 6 / every, 2.0**-9, 448).astype(FP8)
        wide = scales.astype(np.float32)[..., None]
        codes, numbers_ = float4(groups / (wide * every))
        stands_for = (numbers_ * wide * every).reshape(weight.shape).astype(np.float32)
        activation = np.float32(0.001 * (1 + len(module) % 5))
        packed_codes = pairs(codes.reshape(weight.shape))
        if compressed_:
            parameters = {"weight_packed": packed_codes, "weight_scale": scales, "weight_global_scale": held.reshape(1)}
            parameters |= {"input_global_scale": np.array([1 / activation], np.float32)} if inputs else {}
            return Packed(parameters, stands_for)
        parameters = {"weight": packed_codes, "weight_scale": scales, "weight_scale_2": np.asarray(held)}
        parameters |= {"input_scale": np.asarray(activation)} if inputs else {}
        if cache and module.endswith(("k_proj", "v_proj")):
            parameters[f"{module[-6]}_scale"] = np.array(0.5 if module.endswith("k_proj") else 0.75, np.float32)
        return Packed(parameters, stands_for)

    algorithm = "NVFP4" if inputs else ""
    if compressed_:
        weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
        return Format(
            quantize, scheme("nvfp4-pack-quantized", weights, {**weights, "dynamic": "local"} if inputs else None), algorithm
        )
    held_ = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8" if cache else None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    said = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": held_}
    return Format(quantize, {}, algorithm, files={"hf_quant_config.json": said})


def mxfp4(*, named: str = "weight_packed", exponents: str = "uint8") -> Format:
    """MXFP4 of compressed-tensors; Quark calls the weight `weight`. `exponents`: their type."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        groups = weight.reshape(len(weight), -1, 32)
        exponent = np.clip(np.floor(np.log2(np.maximum(np.abs(groups).max(axis=2), 1e-30))) - 2, -127, 127).astype(np.int32)
        codes, numbers_ = float4(np.clip(groups / np.exp2(exponent.astype(np.float64))[..., None], -6, 6))
        stands_for = (numbers_ * np.exp2(exponent.astype(np.float64))[..., None]).reshape(weight.shape).astype(np.float32)
        stored = (exponent + 127).astype(np.uint8).view(np.dtype(getattr(ml_dtypes, exponents, np.uint8)))
        return Packed({named: pairs(codes.reshape(weight.shape)), "weight_scale": stored}, stands_for)

    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return Format(quantize, scheme("mxfp4-pack-quantized", weights, None) if named == "weight_packed" else {}, "")
