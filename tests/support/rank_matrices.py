"""What a rank file holds and should hold of quantized modules, by a reading of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from pipeline import convert
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import LLAMA, Arrays, Format

FORMATS = source.formats()


NATIVE = {name: kind for name, kind in FORMATS.items() if kind.algorithm}


BLOCK = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}


GROUPED = {"has_zero_point": True, "group_size": 64}


BY_ALGORITHM: dict[str, dict[str, Any]] = {
    "": {},
    "W8A16": {},
    "W4A16": {},
    "W4A16_GPTQ": GROUPED,
    "W8A16_GPTQ": GROUPED,
    "W4A16_AWQ": {"pre_quant_scale": True, "group_size": 64},
    "FP8": {},
    "FP8_PER_CHANNEL_PER_TOKEN": {"clamp_val": [-1200.0, 1200.0]},
    "NVFP4": {"group_size": 16},
}


def quantization(output: Path) -> dict[str, Any]:
    return json.loads((output / "config.json").read_text())["quantization"]


def codes_of(stored: np.ndarray, bits: int, features: int, out: int, sm: int) -> np.ndarray:
    """Signed codes [N, K] of a weight in the order of a GPU's kernels."""
    data, columns = stored.reshape(-1).view(np.uint8), 1 if sm == 90 else 16 // bits
    if sm in (100, 103):  # a plain transpose of signed codes
        codes = data if bits == 8 else np.stack([data & 15, data >> 4], axis=-1)
        codes = codes.reshape(out, features).astype(np.int32)
        return np.where(codes >> (bits - 1), codes - (1 << bits), codes)
    if bits == 8:
        places, order = data.reshape(-1, 4), [0, 2, 1, 3]
    else:
        places, order = np.stack([data & 15, data >> 4], axis=-1).reshape(-1, 8), [0, 2, 4, 6, 1, 3, 5, 7]
    stream = np.empty_like(places)
    stream[:, order] = places
    n, k = np.arange(out)[:, None], np.arange(features)[None]
    element = (n // columns) * columns * features + (k // 64) * columns * 64 + (n % columns) * 64 + k % 64
    arranged = stream.reshape(-1)[element].astype(np.int32) - (1 << (bits - 1))
    group = 128 // bits
    d = np.arange(group)
    run = d // 2
    row = (run % (group // 8)) * 8 + run // (group // 8) * 2 + d % 2
    result = np.empty_like(arranged)
    result[:, np.arange(features) // group * group + np.tile(row, features // group)] = arranged
    return result


def matrix(tensors: Arrays, name: str, sm: int = 80) -> np.ndarray:
    """The float32 weight [N, K] of a rank's module, whatever its algorithm; of a stack [E, N, K]."""
    weight = tensors[f"{name}.weight"]
    own = {key.removeprefix(f"{name}."): values for key, values in tensors.items() if key.rpartition(".")[0] == name}
    if weight.ndim == 3:
        experts = [{f"m.{key}": values[e] for key, values in own.items()} for e in range(len(weight))]
        return np.stack([matrix(expert, "m", 80) for expert in experts])
    if "per_channel_scale" in own and weight.dtype == np.int8:
        scale = own["per_channel_scale"].astype(np.float32)
        bits = 8 * weight.shape[1] // len(scale)
        return codes_of(weight, bits, weight.shape[0], len(scale), sm) * scale[:, None]
    if "weights_scaling_factor_2" in own:
        values = np.array([*source.E2M1, *-source.E2M1])
        wide = np.stack([values[weight & 15], values[weight >> 4]], axis=-1).reshape(len(weight), -1, 16)
        wide = wide * own["weights_scaling_factor"].astype(np.float32)[..., None] * own["weights_scaling_factor_2"]
        return wide.reshape(len(weight), -1).astype(np.float32)
    if "weights_scaling_factor" in own and weight.dtype in (np.float16, ml_dtypes.bfloat16):
        scales = own["weights_scaling_factor"].astype(np.float32)
        zeros = own["zero"].astype(np.float32) if "zero" in own else np.zeros_like(scales)
        features, out = weight.shape[0], scales.shape[1]
        bits = 16 * weight.shape[1] // out
        codes = codes_of(weight, bits, features, out, sm)
        group = np.arange(features) // (features // len(scales))
        return codes * scales[group].T + zeros[group].T
    if "prequant_scaling_factor" in own:
        data = weight.view(np.uint8)
        codes = np.stack([(data & 15).astype(np.int32), (data >> 4).astype(np.int32)], axis=1).reshape(-1, data.shape[1])
        codes = np.where(codes > 7, codes - 16, codes)
        scales = own["weights_scaling_factor"]
        group = np.arange(data.shape[1]) // (data.shape[1] // scales.shape[1])
        return codes.astype(np.float32) * scales[:, group] * own["prequant_scaling_factor"].astype(np.float32)
    wide = weight.astype(np.float32)
    if "per_channel_scale" in own:
        return wide * own["per_channel_scale"][:, None]
    return wide * own["weights_scaling_factor"] if "weights_scaling_factor" in own else wide


def cut(tensors: Arrays, config: dict[str, Any], rank: int, tp: int, pp: int = 1) -> dict[str, np.ndarray]:
    """The linear modules of a rank [N, K], cut by hand from Hugging Face weights, under their names there."""
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    stage, r = divmod(rank, tp)
    result = {}
    layers = np.array_split(np.arange(config["num_hidden_layers"]), pp)[stage]
    for local, layer in enumerate(layers):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{local}."

        def rows(name: str, prefix: str = theirs) -> np.ndarray:
            return np.split(tensors[f"{prefix}{name}.weight"], tp)[r]

        def columns(name: str, prefix: str = theirs) -> np.ndarray:
            return np.split(tensors[f"{prefix}{name}.weight"], tp, axis=1)[r]

        def heads(name: str, prefix: str = theirs) -> np.ndarray:
            first, count = r * kv_heads // tp, max(kv_heads // tp, 1)
            return tensors[f"{prefix}{name}.weight"][first * size : (first + count) * size]

        parts = [rows("self_attn.q_proj"), heads("self_attn.k_proj"), heads("self_attn.v_proj")]
        result |= {f"{ours}attention.qkv": np.concatenate(parts), f"{ours}attention.dense": columns("self_attn.o_proj")}
        if f"{theirs}mlp.gate_proj.weight" in tensors:
            result[f"{ours}mlp.fc"] = rows("mlp.gate_proj")
            result[f"{ours}mlp.gate"] = rows("mlp.up_proj")
            result[f"{ours}mlp.proj"] = columns("mlp.down_proj")
    return result


def integers(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight-only codes and scales of a 16-bit matrix [N, K] by the formula: halves away from zero, in float32."""
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max(axis=1) * np.float32(2.0 ** -(bits - 1))
    quotient = (wide / np.where(scale == 0, 1, scale)[:, None]).astype(np.float64)
    rounded = np.copysign(np.floor(np.abs(quotient) + 0.5), quotient)
    top = 1 << (bits - 1)
    return np.clip(rounded, -top, top - 1).astype(np.int32), scale.astype(weight.dtype)


def by_row(weight: np.ndarray, clamp: float = 1200.0) -> tuple[np.ndarray, np.ndarray]:
    """FP8 codes as float32 and the scales of a 16-bit matrix [N, K] by the formula, computed by torch."""
    wide = torch.from_numpy(weight.astype(np.float32)).clamp(-clamp, clamp)
    scale = (wide.abs().amax(dim=1) / 448).clamp(min=1 / (448 * 512))
    codes = (wide / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float().numpy(), scale.numpy()


def as_float8(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.float8_e4m3fn).float().numpy()


def of(kind: str) -> dict[str, Any]:
    """The model that a format is tried on: fbgemm's first and last layers are not quantized, so that it needs another."""
    return {**LLAMA, "num_hidden_layers": 3} if kind == "fbgemm" else LLAMA


def check_stands_for(name: str | Format, directory: Path, **options: Any) -> None:
    """A quantized checkpoint converts to the same bytes as the float model that it stands for."""
    kind, config = (FORMATS[name], of(name)) if isinstance(name, str) else (name, LLAMA)
    weights = source.write(directory / "model", config, kind)
    source.write_float(directory / "float", config, weights)
    convert(model_dir=directory / "model", output_dir=directory / "ours", scheduler="threads", **options)
    plain = {key: value for key, value in options.items() if key != "dequantize"}
    convert(model_dir=directory / "float", output_dir=directory / "theirs", scheduler="threads", **plain)
    assert contents(directory / "ours") == contents(directory / "theirs")


AGAIN: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({"use_weight_only": True, "weight_only_precision": "int8"}, "W8A16"),
    "int4": ({"use_weight_only": True, "weight_only_precision": "int4"}, "W4A16"),
    "fp8": ({"use_fp8_rowwise": True}, "FP8_PER_CHANNEL_PER_TOKEN"),
    "fp8 meta": ({"use_fp8_rowwise": True, "use_meta_fp8_rowwise_recipe": True}, "FP8_PER_CHANNEL_PER_TOKEN"),
}


def hard(weights: Arrays) -> Arrays:
    """Weights with a row of zeros, ties between codes, and a largest magnitude on either side of zero."""
    for name, array in weights.items():
        if source.linear(name):
            array[0] = 0
            array[1] = np.arange(array.shape[1]) % 33 / 64 - 0.25
            array[2] = -array[1]
    return weights


def check_integers(ours: Arrays, module: str, wanted: np.ndarray, bits: int, sm: int = 80) -> None:
    """A weight-only module against the formula."""
    codes, scales = integers(wanted, bits)
    assert ours[f"{module}.weight"].dtype == np.int8
    assert ours[f"{module}.weight"].shape == (wanted.shape[1], wanted.shape[0] * bits // 8)
    assert ours[f"{module}.per_channel_scale"].dtype == wanted.dtype
    np.testing.assert_array_equal(ours[f"{module}.per_channel_scale"], scales)
    found = codes_of(ours[f"{module}.weight"], bits, wanted.shape[1], wanted.shape[0], sm)
    np.testing.assert_array_equal(found, codes)


def signal_to_noise(found: np.ndarray, wanted: np.ndarray) -> float:
    """Decibels."""
    return float(10 * math.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))
