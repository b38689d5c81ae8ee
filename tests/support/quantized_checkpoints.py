"""Tiny quantized Hugging Face checkpoints of every kind, written from the formats' descriptions and by none of headrace's code.

Each quantizer makes of a weight [out, in] the parameters that its format stores and the float32 weight that these stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import checkpoints

Arrays = dict[str, np.ndarray]
BF16, FP8, FP16 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float16)

# Every axis of every rank is a multiple of 64 at tp_size 1, 2 and 4; at 4 two ranks share a kv head.
LLAMA: dict[str, Any] = {
    **checkpoints.LLAMA,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mlp_bias": False,
    "attention_bias": False,
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# AutoRound's names of formats that store the zero points themselves.
ITSELF = ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2", "autoround:exllamav2")
LINEAR = ("qkv_proj", "gate_up_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Packed:
    """What a format stores of one module, by local name, and the float32 weight [out, in] that it stands for."""

    parameters: Arrays
    weight: np.ndarray


Quantizer = Callable[[str, np.ndarray], Packed]


@dataclass(frozen=True)
class Format:
    """A way to quantize a checkpoint.

    `quantizer(module, weight)` packs a module; `settings` is config.json's quantization_config, `files` are JSON files beside it.
    `algorithm` is what TensorRT-LLM calls it, "" where it has no kernel for it; `flags` are options that it needs there. `zero`:
    groups have zero points, as far as a target is concerned.
    """

    quantizer: Quantizer
    settings: dict[str, Any]
    algorithm: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    skip: Callable[[str, int], bool] = lambda module, layers: False  # noqa: ARG005
    zero: bool = True


def linear(name: str) -> bool:
    """Whether a tensor is the weight of a layer's linear module."""
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR


def values(config: dict[str, Any], seed: int = 0) -> Arrays:
    """A float model of the configuration: weights about as large as those of trained models, a little off centre."""
    random = np.random.default_rng(seed)
    result = {}
    for name, array in checkpoints.values(config, seed).items():
        wide = array.astype(np.float32)
        if array.ndim == 2:
            wide = wide * 0.05 + random.normal(0, 0.02, (len(array), 1))
        result[name] = wide.astype(array.dtype)
    return result


def write(directory: Path, config: dict[str, Any], kind: Format, *, tensors: Arrays | None = None, shards: int = 1) -> Arrays:
    """Save a quantized checkpoint of a float model; returns the tensors that it stands for, quantized ones as float32."""
    tensors = values(config) if tensors is None else tensors
    stored, stands_for = quantized(tensors, kind, config["num_hidden_layers"])
    checkpoints.save(directory, described(config, kind), stored, shards=shards)
    for name, content in kind.files.items():
        (directory / name).write_text(json.dumps(content))
    return stands_for


def quantized(tensors: Arrays, kind: Format, layers: int) -> tuple[Arrays, Arrays]:
    """The tensors of a float model as a format stores them, and what they stand for."""
    stored: Arrays = {}
    stands_for: Arrays = {}
    for name, array in tensors.items():
        module = name.removesuffix(".weight")
        if not linear(name) or kind.skip(module, layers):
            stored[name] = stands_for[name] = array
            continue
        packed = kind.quantizer(module, array.astype(np.float32))
        stored |= {f"{module}.{key}": np.ascontiguousarray(value) for key, value in packed.parameters.items()}
        stands_for[name] = packed.weight
    return stored, stands_for


def described(config: dict[str, Any], kind: Format) -> dict[str, Any]:
    """config.json with what the quantizer says."""
    return {**config, "quantization_config": kind.settings} if kind.settings else config


def write_float(directory: Path, config: dict[str, Any], tensors: Arrays) -> None:
    """Save the float model that a quantized checkpoint stands for, its quantized tensors as float32."""
    checkpoints.save(directory, config, {name: np.ascontiguousarray(array) for name, array in tensors.items()})


# --- integer codes by groups of in-features


def grouped(
    weight: np.ndarray, bits: int, group: int, symmetric: bool, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes [N, K], zero points [N, G] and scales [N, G] of the type that the format stores."""
    out, features = weight.shape
    groups = weight.reshape(out, features // group, group)
    top = (1 << bits) - 1
    if symmetric:
        scales = (np.abs(groups).max(axis=2) * 2 / top).astype(dtype)
        zeros = np.full(scales.shape, 1 << (bits - 1))
    else:
        low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
        scales = ((high - low) / top).astype(dtype)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, top)
    codes = np.clip(np.rint(groups / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(out, features).astype(np.int64), zeros.astype(np.int64), scales


def numbers(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray | None = None) -> np.ndarray:
    """float32 (code - zero) * scale of each in-feature's group; exact, as codes and scales have few bits."""
    index = np.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1]) if index is None else index
    return (codes - zeros[:, index]).astype(np.float32) * scales.astype(np.float32)[:, index]


def packed32(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] = ()) -> np.ndarray:
    """int32 words of unsigned codes along an axis: place i of a word, lowest first, holds code `order[i]` of its run."""
    count = 32 // bits
    runs = np.moveaxis(codes.astype(np.uint32), axis, -1)
    runs = runs.reshape(*runs.shape[:-1], -1, count)
    words = sum(runs[..., source] << np.uint32(bits * place) for place, source in enumerate(order or range(count)))
    return np.moveaxis(np.asarray(words, dtype=np.uint32), -1, axis).view(np.int32)


def auto_round(*, bits: int = 4, group: int = 64, sym: bool = False, packing: str = "auto_round", older: bool = False) -> Format:
    """AutoRound's format; `packing` says how it packs: as GPTQ with zero points less one, as GPTQ with these themselves, or as AWQ.

    `older`: the settings as they were called before version 0.5.
    """
    kind = (
        awq(group=group, sym=sym)
        if "awq" in packing
        else gptq(bits=bits, group=group, sym=sym, second=packing in ITSELF, index="none")
    )
    method, key = ("intel/auto-round", "backend") if older else ("auto-round", "packing_format")
    settings = {"quant_method": method, key: packing, "bits": bits, "group_size": group, "sym": sym, "data_type": "int"}
    return replace(kind, settings={**settings, "autoround_version": "0.4.3" if older else "0.8.0"})


def gptq(
    *,
    bits: int = 4,
    group: int = 64,
    sym: bool = True,
    second: bool = False,
    index: str = "trivial",
    bias: bool = False,
    said: bool = True,
    dtype: np.dtype = FP16,
    beside: bool = False,
) -> Format:
    """AutoGPTQ's and GPTQModel's format.

    `group` -1: one scale a row. `second`: zero points as format v2 has them, and `said` whether the settings say so. `index`:
    "trivial", "none", or "order", where the groups follow the activations. `bias`: every module has one, of zeros. `beside`: the
    settings are in a file of their own.
    """
    random = np.random.default_rng(5)

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        out, features = weight.shape
        size = features if group == -1 else group
        order = random.permutation(features) if index == "order" else np.arange(features)
        arranged, zeros, scales = grouped(weight[:, order], bits, size, sym, dtype)
        codes = np.empty_like(arranged)
        codes[:, order] = arranged
        groups = np.empty(features, dtype=np.int32)
        groups[order] = np.arange(features) // size
        stored = zeros if second else zeros - 1
        parameters = {
            "qweight": packed32(codes.T, bits, 0),
            "qzeros": packed32(stored.T, bits, 1),
            "scales": scales.T,
            **({} if index == "none" else {"g_idx": groups}),
            **({"bias": np.zeros(out, np.float16)} if bias else {}),
        }
        return Packed(parameters, numbers(codes, zeros, scales, groups))

    version = "gptq_v2" if second and said else "gptq"
    settings = {"bits": bits, "group_size": group, "desc_act": index == "order", "sym": sym, "checkpoint_format": version}
    named, algorithm = {**settings, "quant_method": "gptq"}, f"W{bits}A16{'' if group == -1 and sym else '_GPTQ'}"
    return Format(quantize, {} if beside else named, algorithm, files={"quantize_config.json": settings} if beside else {})


def awq(*, group: int = 64, dtype: np.dtype = FP16, zero_point: bool = True, stored: bool = True, sym: bool = False) -> Format:
    """AutoAWQ's gemm format; `group` -1: one scale a row.

    `sym`: its zero points are all 8, as they are without `zero_point`, and then `stored` or not.
    """

    def quantize(module: str, weight: np.ndarray) -> Packed:  # noqa: ARG001
        codes, zeros, scales = grouped(weight, 4, weight.shape[1] if group == -1 else group, sym or not zero_point, dtype)
        columns = (0, 2, 4, 6, 1, 3, 5, 7)
        parameters = {"qweight": packed32(codes.T, 4, 1, columns), "qzeros": packed32(zeros.T, 4, 1, columns), "scales": scales.T}
        if not stored:
            del parameters["qzeros"]
        return Packed(parameters, numbers(codes, zeros, scales))

    settings = {"bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm", "quant_method": "awq"}
    algorithm = "W4A16" if group == -1 and (sym or not zero_point) else "W4A16_GPTQ"
    return Format(quantize, {**settings, "modules_to_not_convert": None}, algorithm, zero=zero_point)


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
    return Format(quantize, _groups("pack-quantized", weights, None), f"W{bits}A16{'' if group == -1 and sym else '_GPTQ'}")


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
    return Format(quantize, _groups("int-quantized", weights, {**inputs, "dynamic": not static}), algorithm)


def _groups(name: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


# --- float8


def float8(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a weight and what they stand for; `scale` is one, or one for each row [N, 1]."""
    wide = scale.astype(np.float32)
    codes = np.clip(weight / wide, -448, 448).astype(FP8)
    return codes, codes.astype(np.float32) * wide


def compressed_float8(*, dynamic: bool, dtype: np.dtype = BF16) -> Format:
    """compressed-tensors' float-quantized format: one scale and static activations, or a scale a row and dynamic ones."""

    def quantize(module: str, weight: np.ndarray) -> Packed:
        largest = np.abs(weight).max(axis=1, keepdims=True) if dynamic else np.abs(weight).max().reshape(1)
        scale = (largest / 448).astype(dtype)
        codes, stands_for = float8(weight, scale)
        inputs = {} if dynamic else {"input_scale": np.array([0.01 + len(module) % 7 / 100], dtype)}
        return Packed({"weight": codes, "weight_scale": scale, **inputs}, stands_for)

    strategy = "channel" if dynamic else "tensor"
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    inputs = {**weights, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    settings = _groups("float-quantized", weights, inputs)
    return Format(quantize, settings, "FP8_PER_CHANNEL_PER_TOKEN" if dynamic else "FP8")


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


def modelopt_awq(*, group: int = 64, dtype: np.dtype = BF16) -> Format:
    """ModelOpt's INT4-AWQ: the factors of the activations are folded into the module before, but for o_proj and down_proj."""
    random = np.random.default_rng(6)

    def quantize(module: str, weight: np.ndarray) -> Packed:
        smooth = random.uniform(0.5, 2, weight.shape[1]).astype(dtype)
        smooth = smooth if module.endswith(("o_proj", "down_proj")) else np.ones_like(smooth)
        scaled = (weight / smooth.astype(np.float32)).reshape(len(weight), -1, group)
        scales = np.abs(scaled).max(axis=2) / np.float32(7)
        codes = np.clip(np.rint(scaled / scales[..., None]), -8, 7).reshape(weight.shape).astype(np.int64)
        stands_for = codes.astype(np.float32) * np.repeat(scales, group, axis=1) * smooth.astype(np.float32)
        parameters = {"weight": ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8), "weight_scale": scales}
        if module.endswith(("o_proj", "down_proj")):
            parameters["pre_quant_scale"] = smooth
        return Packed(parameters, stands_for)

    held = {"quant_algo": "W4A16_AWQ", "group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    said = {"producer": {"name": "modelopt", "version": "0.27.0"}, "quantization": {**held, "exclude_modules": ["lm_head"]}}
    return Format(quantize, {}, "W4A16_AWQ", files={"hf_quant_config.json": said})


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
        "modelopt fp8": modelopt_float8(),
        "modelopt awq": modelopt_awq(),
        "fbgemm": fbgemm(),
    }
