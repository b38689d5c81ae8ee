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
PLACES = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
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
    """int32 words of unsigned codes along an axis: place i of a word, lowest first, holds code `order[i]` of its run.

    Codes of 3 bits go over the ends of words: their bits are one stream.
    """
    if 32 % bits:
        stream = (np.moveaxis(codes, axis, -1)[..., None] >> np.arange(bits)) & 1
        data = np.packbits(stream.reshape(*stream.shape[:-2], -1).astype(np.uint8), axis=-1, bitorder="little")
        return np.moveaxis(np.ascontiguousarray(data).view(np.int32), -1, axis)
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
    named, algorithm = {**settings, "quant_method": "gptq"}, f"W{max(bits, 4)}A16{'' if group == -1 and sym else '_GPTQ'}"
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
        return Format(quantize, _groups("float-quantized", weights, inputs), "")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [tile, tile]}
    return Format(quantize, settings, "")


# --- 4-bit floats

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
            quantize, _groups("nvfp4-pack-quantized", weights, {**weights, "dynamic": "local"} if inputs else None), algorithm
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
    return Format(quantize, _groups("mxfp4-pack-quantized", weights, None) if named == "weight_packed" else {}, "")


# --- bitsandbytes

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


# --- several formats in one model


def each_its_own(kinds: dict[str, Format], settings: dict[str, Any], files: dict[str, dict[str, Any]] | None = None) -> Format:
    """Modules of several formats, by the first part of their names that fits ("": all); those of no format are not quantized."""

    def quantize(module: str, weight: np.ndarray) -> Packed:
        kind = own(kinds, module)
        assert kind is not None, "skipped"
        return kind.quantizer(module, weight)

    return Format(quantize, settings, "", files or {}, skip=lambda module, layers: own(kinds, module) is None)  # noqa: ARG005


def own(kinds: dict[str, Format], module: str) -> Format | None:
    """The format of a module, by the first part of its name that fits."""
    return next((kind for part, kind in kinds.items() if part in module), None)


def mixed_precision(kinds: dict[str, Format], layers: int) -> Format:
    """ModelOpt's export of a model in several algorithms (MIXED_PRECISION), the modules' own in `quantized_layers`."""
    quantized_layers = {}
    for module in (f"model.layers.{n}.{place}" for n in range(layers) for place in PLACES):
        kind = own(kinds, module)
        if kind is not None:
            said = kind.files["hf_quant_config.json"]["quantization"]
            quantized_layers[module] = {key: said[key] for key in ("quant_algo", "group_size") if key in said}
    held = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": quantized_layers}
    said = {"producer": {"name": "modelopt", "version": "0.35.0"}, "quantization": {**held, "exclude_modules": ["lm_head"]}}
    return each_its_own(kinds, {}, {"hf_quant_config.json": said})


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
        "fp8 block": block_float8(),
        "fp8 block of 96": block_float8(tile=96, dtype=np.dtype(np.float32)),
        "compressed fp8 block": block_float8(compressed_=True),
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
