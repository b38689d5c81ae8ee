"""Float8 weights with their scales."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.quantized_checkpoints.base import BF16, FP8, Format, Packed
from tests.support.quantized_checkpoints.compressed_tensors import scheme


def float8(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a weight and what they stand for; `scale` is one, or one for each row [N, 1]."""
    wide = scale.astype(np.float32)
    codes = np.clip(weight / wide, -448, 448).astype(FP8)
    return codes, codes.astype(np.float32) * wide


def compressed_float8(*, dynamic: bool, dtype: np.dtype = BF16, rows: bool = False) -> Format:
    """compressed-tensors' float-quantized format: one scale and static activations, or a scale a row and dynamic ones. `rows`: a
    scale a row, and static ones, as AutoRound has them.
    """
    by_row = dynamic or rows

    def quantize(module: str, weight: np.ndarray) -> Packed:
        largest = np.abs(weight).max(axis=1, keepdims=True) if by_row else np.abs(weight).max().reshape(1)
        scale = (largest / 448).astype(dtype)
        codes, stands_for = float8(weight, scale)
        inputs = {} if dynamic else {"input_scale": np.array([0.01 + len(module) % 7 / 100], dtype)}
        return Packed({"weight": codes, "weight_scale": scale, **inputs}, stands_for)

    strategy = "channel" if by_row else "tensor"
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    inputs = {**weights, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    settings = scheme("float-quantized", weights, inputs)
    return Format(quantize, settings, "FP8_PER_CHANNEL_PER_TOKEN" if by_row else "FP8")


def modelopt_float8(*, cache: bool = True) -> Format:
    """ModelOpt's FP8, as its Hugging Face export has it; `cache`: with scales of keys and values."""

    def quantize(module: str, weight: np.ndarray) -> Packed:
        scale = np.float32(np.abs(weight).max() / np.float32(448))
        codes, stands_for = float8(weight, np.asarray(scale))
        parameters = {
            "weight": codes,
            "weight_scale": np.array(scale, np.float32),
            "input_scale": np.array(0.02 + len(module) % 5 / 100, np.float32),
        }
        if cache and module.endswith(("k_proj", "v_proj")):
            layer = int(module.split(".")[2])
            parameters[f"{module[-6]}_scale"] = np.array(0.5 + layer + (0.25 if module.endswith("k_proj") else 0), np.float32)
        return Packed(parameters, stands_for)

    held = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if cache else None, "exclude_modules": ["lm_head"]}
    said = {"producer": {"name": "modelopt", "version": "0.27.0"}, "quantization": held}
    return Format(quantize, {}, "FP8", files={"hf_quant_config.json": said})


def fbgemm(*, bound: float = 1200.0) -> Format:
    """fbgemm's FP8, as Llama-3.1-405B-FP8 has it: neither the attention nor the first and last layers are quantized."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        scale = (np.abs(weight).max(axis=1, keepdims=True) / np.float32(448)).astype(np.float32)
        codes, stands_for = float8(weight, scale)
        return Packed({"weight": codes, "weight_scale": scale, "input_scale_ub": np.array([bound], np.float32)}, stands_for)

    def skip(module: str, layers: int) -> bool:
        return ".self_attn." in module or module.startswith(("model.layers.0.", f"model.layers.{layers - 1}."))

    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": bound, "modules_to_not_convert": ["lm_head"]}
    return Format(quantize, settings, "FP8_PER_CHANNEL_PER_TOKEN", flags={"use_meta_fp8_rowwise_recipe": True}, skip=skip)


def by_tile(weight: np.ndarray, tile: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float8 codes, the scale of each tile, rounded up at the ends of rows and columns, and what the codes stand for."""
    out, features = weight.shape
    scales = np.empty((-(-out // tile), -(-features // tile)), dtype)
    codes, stands_for = np.empty(weight.shape, FP8), np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(scales.shape):
        part = (slice(i * tile, (i + 1) * tile), slice(j * tile, (j + 1) * tile))
        scales[i, j] = max(np.abs(weight[part]).max() / 448, 1e-12)
        codes[part], stands_for[part] = float8(weight[part], np.asarray(scales[i, j]))
    return codes, scales, stands_for


def block_float8(*, tile: int = 128, compressed_: bool = False, dtype: np.dtype = BF16) -> Format:
    """FP8 with a scale for each tile: as DeepSeek and Qwen3 have it, or compressed-tensors' strategy `block`."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        codes, scales, stands_for = by_tile(weight, tile, dtype)
        return Packed({"weight": codes, "weight_scale" if compressed_ else "weight_scale_inv": scales}, stands_for)

    if compressed_:
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [tile, tile], "symmetric": True}
        inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": tile, "dynamic": True, "symmetric": True}
        return Format(quantize, scheme("float-quantized", weights, inputs), "")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [tile, tile]}
    return Format(quantize, settings, "")


def modelopt_block_float8() -> Format:
    """ModelOpt's FP8 by block, for weights alone: scales have an axis of one beside each axis of tiles."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        codes, scales, stands_for = by_tile(weight, 128, np.dtype(np.float32))
        return Packed({"weight": codes, "weight_scale": scales[:, None, :, None]}, stands_for)

    held = {"quant_algo": "fp8_pb_wo", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    said = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": held}
    return Format(quantize, {}, "", files={"hf_quant_config.json": said})


def gptqmodel_float8(*, method: str, tile: tuple[int, int] = (128, 64)) -> Format:
    """GPTQModel's FP8, by `block`, by `row` or by `tensor`: it stores what weights were multiplied by."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        out, features = weight.shape
        height, width = {"block": tile, "row": (1, features), "tensor": (out, features)}[method]
        tiles = np.pad(weight, ((0, -out % height), (0, -features % width)))
        largest = np.abs(tiles.reshape(-(-out // height), height, -1, width)).max(axis=(1, 3))
        inverse = (448 / np.maximum(largest, 1e-12)).astype(np.float32)
        wide = np.repeat(np.repeat(inverse, height, axis=0), width, axis=1)[:out, :features]
        codes = np.clip(weight * wide, -448, 448).astype(FP8)
        stored = inverse if method == "block" else inverse.reshape(() if method == "tensor" else (-1,))
        return Packed({"weight": codes, "weight_scale_inv": stored}, codes.astype(np.float32) / wide)

    settings = {
        "quant_method": "fp8",
        "format": "float8_e4m3fn",
        "weight_scale_method": method,
        "weight_scale_semantics": "inverse",
    }
    return Format(quantize, {**settings, **({"weight_block_size": list(tile)} if method == "block" else {})}, "")


def mxfp8(*, exponents: str = "uint8") -> Format:
    """MXFP8: float8 with a power of two for each 32 in-features. `exponents`: their type."""

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        groups = weight.reshape(len(weight), -1, 32)
        exponent = np.floor(np.log2(np.maximum(np.abs(groups).max(axis=2), 1e-30))).astype(np.int32) - 8
        codes, stands_for = float8(groups, np.exp2(exponent.astype(np.float32))[..., None])
        stored = (exponent + 127).astype(np.uint8).view(np.dtype(getattr(ml_dtypes, exponents, np.uint8)))
        return Packed({"weight": codes.reshape(weight.shape), "weight_scale": stored}, stands_for.reshape(weight.shape))

    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "scale_dtype": "torch.uint8",
    }
    return Format(quantize, scheme("mxfp8-quantized", weights, {**weights, "dynamic": True}), "")
