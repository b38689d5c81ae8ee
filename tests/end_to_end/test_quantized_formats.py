"""Every quantized format end to end, against a decoder of TensorRT-LLM's layouts that is written from their description alone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from pipeline import BadInput, convert, plan, verify
from tests.support import checkpoints, gguf_files
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import LLAMA, MIXTRAL, Arrays, Format
from tests.support.rank_files import TYPES, read

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


# --- what a rank file holds


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


# --- what it should hold


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


# (tp_size, pp_size). At 4 ranks two share a kv head, and a rank has one group of o_proj's in-features.
SIZES = {"tp1": (1, 1), "tp2": (2, 1), "tp2pp2": (2, 2), "tp4": (4, 1)}
FEW = {
    "tp2pp2": ("gptq", "modelopt fp8", "fbgemm", "compressed w4a16 asymmetric", "modelopt awq", "nvfp4"),
    "tp4": (
        "nvfp4",
        "compressed nvfp4",
        "gptq asymmetric",
        "awq",
        "modelopt awq",
        "compressed fp8",
        "compressed fp8 dynamic",
        "gptq 8 bits",
    ),
}
CASES = [(name, size) for size in SIZES for name in FEW.get(size, NATIVE)]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_format_keeps_its_codes(name: str, size: str, tmp_path: Path) -> None:
    kind, (tp, pp), config = FORMATS[name], SIZES[size], of(name)
    weights = source.write(tmp_path / "model", config, kind, shards=2)
    options = {"tp_size": tp, "pp_size": pp, "scheduler": "threads", **kind.flags}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **options)
    check_block(tmp_path / "out", name)
    held = read_source(tmp_path / "model")
    for rank in range(tp * pp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, config, rank, tp, pp).items():
            check_matrix(ours, module, wanted, kind, held, rank // tp)


def check_block(output: Path, name: str) -> None:
    kind = FORMATS[name]
    expected = {**BLOCK, "quant_algo": kind.algorithm, **BY_ALGORITHM[kind.algorithm]}
    expected["has_zero_point"] = kind.algorithm.endswith("_GPTQ") and kind.zero
    expected |= {"use_meta_recipe": True} if kind.flags else {}
    expected |= {"group_size": int(name.rpartition(" ")[2])} if "groups of" in name else {}
    found = quantization(output)
    assert found == expected
    assert list(found) == list(BLOCK)


def read_source(directory: Path) -> Arrays:
    result: Arrays = {}
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, row in json.loads(data[8 : 8 + length]).items():
            if name.endswith("_scale") and name != "__metadata__":
                first, last = (8 + length + offset for offset in row["data_offsets"])
                result[name] = np.frombuffer(data[first:last], TYPES[row["dtype"]]).reshape(row["shape"])
    return result


def check_matrix(ours: Arrays, module: str, wanted: np.ndarray, kind: Format, held: Arrays, stage: int) -> None:
    found = matrix(ours, module)
    assert found.shape == wanted.shape
    if kind.algorithm.endswith("_GPTQ"):
        # Scales and zeros are rounded to the model's type; a code that is off by one is a whole scale away.
        assert ours[f"{module}.weight"].dtype == ours[f"{module}.weights_scaling_factor"].dtype == np.float16
        assert (f"{module}.zero" in ours) == kind.zero
        assert not kind.zero or ours[f"{module}.zero"].dtype == np.float16
        scales = ours[f"{module}.weights_scaling_factor"].astype(np.float32)
        scale = np.repeat(scales.T, wanted.shape[1] // len(scales), axis=1)
        assert np.all(np.abs(found - wanted) <= scale * 0.15)
    elif kind.algorithm in ("W8A16", "W4A16"):
        # A scale is rounded once, where the source has it in float32; a code that is off by one is a 128th away.
        assert (ours[f"{module}.weight"].dtype, ours[f"{module}.per_channel_scale"].dtype) == (np.int8, np.float16)
        assert np.all(np.abs(found - wanted) <= np.abs(wanted) * 2.0**-11)
    elif kind.algorithm == "FP8" and module.endswith("qkv"):
        # q, k and v are brought to the largest of their scales.
        layer = int(module.split(".")[2]) + stage
        scales = [held[f"model.layers.{layer}.self_attn.{part}_proj.weight_scale"].astype(np.float32).max() for part in "qkv"]
        common = np.float32(max(scales))
        assert ours[f"{module}.weights_scaling_factor"].tolist() == [common]
        np.testing.assert_array_equal(found, as_float8(wanted / common) * common)
        inputs = [held[f"model.layers.{layer}.self_attn.{part}_proj.input_scale"].astype(np.float32).max() for part in "qkv"]
        assert ours[f"{module}.activation_scaling_factor"].tolist() == [max(inputs)]
    elif kind is FORMATS["nvfp4 scales apart"] and module.endswith("qkv"):
        # A scale of a group has three bits of mantissa, and is rounded once more.
        assert np.all(np.abs(found - wanted) <= np.abs(wanted) * 2.0**-4)
        assert not np.array_equal(found, wanted)
        assert ours[f"{module}.weights_scaling_factor_2"].tolist() == [2.0**-9 * 1.5]
    elif kind.skip("model.layers.0.self_attn", 1) and f"{module}.per_channel_scale" not in ours:
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["gptq asymmetric", "gptq bf16 scales", "awq", "compressed w4a16", "modelopt awq"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_pass_for_the_type_that_is_asked_for(name: str, dtype: str, tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LLAMA, FORMATS[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", dtype=dtype, scheduler="threads")
    ours, wanted = read(tmp_path / "out/rank0.safetensors"), cut(weights, LLAMA, 0, 1)
    if name == "modelopt awq":
        assert str(ours["transformer.layers.0.mlp.proj.prequant_scaling_factor"].dtype) == dtype
        return
    for module, matrix_ in wanted.items():
        own = {key: ours[f"{module}.{key}"] for key in ("weight", "weights_scaling_factor", "zero")}
        assert {str(values.dtype) for values in own.values()} == {dtype}
        assert own["weight"].shape == (matrix_.shape[1], matrix_.shape[0] // 4)
        found = matrix(ours, module)
        # One code more or less is a whole scale.
        scales = own["weights_scaling_factor"].astype(np.float32)
        assert np.all(np.abs(found - matrix_) <= np.repeat(scales.T, matrix_.shape[1] // len(scales), axis=1) * 0.15)


@pytest.mark.parametrize("tp", [1, 2])
def test_int8_by_row_keeps_its_bytes(tp: int, tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": "bfloat16"}
    source.write(tmp_path / "model", config, FORMATS["compressed w8a8"])
    stored, _ = source.quantized(source.values(config), FORMATS["compressed w8a8"], 2)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=tp, scheduler="threads")
    scales = {name.replace("_scale", ""): values for name, values in stored.items() if name.endswith("weight_scale")}
    for rank in range(tp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        by_rank = cut({name: stored[name] for name in scales}, config, rank, tp)
        for module, wanted in by_rank.items():
            out, features = wanted.shape
            np.testing.assert_array_equal(codes_of(ours[f"{module}.weight"], 8, features, out, 2), wanted)
        # A row has one scale on all ranks that share it.
        columns = cut({name: np.repeat(values, 256, 1) for name, values in scales.items()}, config, rank, tp)
        for module, wanted in columns.items():
            assert ours[f"{module}.per_channel_scale"].tobytes() == np.ascontiguousarray(wanted[:, 0]).tobytes()
    notes = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    (note,) = [note for note in notes if "integers of 8 bits, dynamic, by token" in note]
    assert "W8A16" in note


def test_static_scales_of_int8_activations_are_left_out_with_a_word(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["compressed w8a8 static"])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads")
    said = json.loads((tmp_path / "out/headrace.json").read_text())
    left = {name.rpartition(".")[2]: reason for name, reason in said["left_out"].items()}
    assert left == {
        "input_scale": "the activations have no scale of their own in the target",
        "input_zero_point": "activations are not quantized to integers",
    }
    assert sum(name.endswith("input_scale") for name in said["left_out"]) == 14
    assert "integers of 8 bits, static, by tensor" in said["notes"][0]


# Codes that the kernels of a scale a row do not read: with zero points, in groups of the activations' order, of several widths.
MANY = {
    "asymmetric": source.compressed(group=-1, sym=False),
    "asymmetric gptq": source.gptq(group=-1, sym=False),
    "asymmetric int8": source.compressed_int8(sym=False),
    "in the activations' order": source.compressed(order=True, sym=False),
    "in the activations' order, 8 bits": source.compressed(order=True, bits=8),
}


@pytest.mark.parametrize("more", [{"dequantize": True}, {"requantize": True, "group_size": 64}], ids=str)
@pytest.mark.parametrize("name", MANY)
def test_codes_that_no_kernel_reads_are_made_numbers(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    if "dequantize" in more:
        check_stands_for(MANY[name], tmp_path, tp_size=2, **more)
        return
    weights = source.write(tmp_path / "model", LLAMA, MANY[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2, **more)
    algorithm = "W8A16_GPTQ" if "int8" in name or "8 bits" in name else "W4A16_GPTQ"  # as wide as they were
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": algorithm, **GROUPED}
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, LLAMA, rank, 2).items():
            assert signal_to_noise(matrix(ours, module), wanted) > 15, module


@pytest.mark.parametrize("name", ["in the activations' order", "in the activations' order, 8 bits"])
def test_groups_of_compressed_tensors_in_the_activations_order_are_refused(name: str, tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, MANY[name])
    with pytest.raises(BadInput) as refused:
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    (problem,) = refused.value.problems
    assert problem.subject.endswith(".weight_g_idx")
    assert "desc_act" in problem.found
    assert "--requantize" in problem.remedy
    assert "--dequantize" in problem.remedy


def several_widths(directory: Path) -> Arrays:
    """A checkpoint of compressed-tensors whose down projections have 8 bits, a scale a row, and whose others have 4, in groups."""
    tensors, (four, eight) = source.values(LLAMA), (source.compressed(), source.compressed(bits=8, group=-1))
    stored, stands_for = source.quantized(tensors, four, 2)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj"
        packed = eight.quantizer(name, tensors[f"{name}.weight"].astype(np.float32))
        stored |= {f"{name}.{key}": np.ascontiguousarray(values) for key, values in packed.parameters.items()}
        stands_for[f"{name}.weight"] = packed.weight
    groups = [kind.settings["config_groups"]["group_0"] for kind in (four, eight)]
    groups[1] = {**groups[1], "targets": ["re:.*down_proj"]}
    settings = {**four.settings, "config_groups": {f"group_{n}": group for n, group in enumerate(groups)}}
    checkpoints.save(directory, {**LLAMA, "quantization_config": settings}, stored)
    return stands_for


def test_several_widths_are_made_numbers_and_else_refused(tmp_path: Path) -> None:
    weights = several_widths(tmp_path / "model")
    with pytest.raises(BadInput, match="codes of 8 bits"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    source.write_float(tmp_path / "float", LLAMA, weights)
    options = {"scheduler": "threads", "tp_size": 2}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", dequantize=True, **options)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", **options)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "again", requantize=True, **options)
    assert quantization(tmp_path / "again") == {**BLOCK, "quant_algo": "W4A16_GPTQ", **GROUPED}
    for rank in range(2):
        ours = read(tmp_path / f"again/rank{rank}.safetensors")
        for module, wanted in cut(weights, LLAMA, rank, 2).items():
            assert signal_to_noise(matrix(ours, module), wanted) > 17, module


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq"])
def test_layers_that_auto_round_quantizes_otherwise(packing: str, tmp_path: Path) -> None:
    """`extra_config`: one in 8 bits, by its name, and one with zero points in the middle, by a pattern."""
    tensors, kind = source.values(LLAMA), source.auto_round(packing=packing)
    others = {
        "model.layers.0.mlp.down_proj": source.auto_round(packing=packing, bits=8, group=128),
        "model.layers.1.self_attn.q_proj": source.auto_round(packing=packing, sym=True, group=128),
    }
    stored, stands_for = source.quantized(tensors, kind, 2)
    for name, other in others.items():
        packed = other.quantizer(name, tensors[f"{name}.weight"].astype(np.float32))
        stored |= {f"{name}.{key}": np.ascontiguousarray(values) for key, values in packed.parameters.items()}
        stands_for[f"{name}.weight"] = packed.weight
    extra = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 128},
        r".*layers\.1\.self_attn\.q.*": {"sym": True, "group_size": 128},
    }
    checkpoints.save(tmp_path / "model", {**LLAMA, "quantization_config": {**kind.settings, "extra_config": extra}}, stored)
    with pytest.raises(BadInput, match=r"codes of \d bits"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    source.write_float(tmp_path / "float", LLAMA, stands_for)
    options = {"scheduler": "threads", "tp_size": 2}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", dequantize=True, **options)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", **options)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


OWN = {
    "gptq": {"use_weight_only": True, "weight_only_precision": "int4_gptq", "group_size": 64},
    "awq": {"use_weight_only": True, "weight_only_precision": "int4_gptq"},
    "compressed w4a16": {"use_weight_only": True, "weight_only_precision": "int4_gptq"},
    "gptq 8 bits": {"use_weight_only": True, "weight_only_precision": "int8_gptq"},
    "modelopt awq": {"use_weight_only": True, "weight_only_precision": "int4_awq"},
    "modelopt fp8": {"use_fp8": True},
    "compressed fp8": {"use_fp8": True},
    "compressed fp8 dynamic": {"use_fp8_rowwise": True},
    "fbgemm": {"use_fp8_rowwise": True},
    "nvfp4": {"use_nvfp4": True},
    "compressed nvfp4": {"use_nvfp4": True},
}


@pytest.mark.parametrize("name", OWN)
def test_to_name_the_source_s_own_algorithm_changes_nothing(name: str, tmp_path: Path) -> None:
    source.write(tmp_path / "model", of(name), FORMATS[name])
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "scheduler": "threads", **FORMATS[name].flags}
    convert(output_dir=tmp_path / "named", **options, **OWN[name])
    convert(output_dir=tmp_path / "found", **options)
    assert contents(tmp_path / "named") == contents(tmp_path / "found")


def test_act_order_that_orders_nothing_is_none(tmp_path: Path) -> None:
    kind = source.gptq(sym=False)
    ordered = dataclasses.replace(kind, settings={**kind.settings, "desc_act": True})
    for name, each in (("plain", kind), ("ordered", ordered)):
        source.write(tmp_path / name, LLAMA, each)
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"{name}-out", scheduler="threads")
    assert contents(tmp_path / "ordered-out") == contents(tmp_path / "plain-out")


LARGE = {**LLAMA, "num_hidden_layers": 1, "intermediate_size": 16640}


@pytest.mark.parametrize("name", ["gptq asymmetric", "awq", "modelopt awq", "compressed w4a16 asymmetric"])
def test_more_rows_than_a_block(name: str, tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LARGE, FORMATS[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, scheduler="threads")
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, LARGE, rank, 2).items():
            check_matrix(ours, module, wanted, FORMATS[name], {}, 0)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_more_rows_than_a_block_of_numbers(precision: str, sm: int, tmp_path: Path) -> None:
    weights = source.values(LARGE)
    checkpoints.save(tmp_path / "model", LARGE, weights)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, sm=sm, scheduler="threads", **AGAIN[precision][0])
    ours = read(tmp_path / "out/rank1.safetensors")
    for module, wanted in cut(weights, LARGE, 1, 2).items():
        check_integers(ours, module, wanted, int(precision[3:]), sm)


# --- numbers again


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_is_the_model_that_the_checkpoint_stands_for(name: str, dtype: str, tmp_path: Path) -> None:
    check_stands_for(name, tmp_path, dtype=dtype, tp_size=2, dequantize=True)
    assert quantization(tmp_path / "ours") == BLOCK


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not kind.algorithm])
def test_what_no_kernel_takes_is_dequantized_without_being_asked(name: str, tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS[name])
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "scheduler": "threads"}
    made = "dequantized: TensorRT-LLM 1.2 has no algorithm that takes "
    assert len([note for note in plan(output_dir=tmp_path / "ours", **options).notes if note.startswith(made)]) == 1
    convert(output_dir=tmp_path / "ours", **options)
    convert(output_dir=tmp_path / "asked", dequantize=True, **options)
    notes = plan(output_dir=tmp_path / "asked", overwrite=True, dequantize=True, **options).notes
    assert not [note for note in notes if note.startswith("dequantized")]
    for rank in range(2):
        ours, asked = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "asked"))
        assert ours == asked


def test_activations_and_embeddings_of_nvfp4(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["nvfp4 cache"])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, fp8_kv_cache=True, scheduler="threads")
    ours, layer = read(tmp_path / "out/rank1.safetensors"), "transformer.layers.1."
    held = {"attention.qkv": "self_attn.q_proj", "attention.dense": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}
    for module, theirs in held.items():
        names = [f"model.layers.1.{theirs.replace('q_proj', part)}" for part in ("q_proj", "k_proj", "v_proj")]
        largest = np.float32(0.001 * max(1 + len(name) % 5 for name in names))
        assert ours[f"{layer}{module}.activation_scaling_factor"].tolist() == [largest]
        assert {key: str(ours[f"{layer}{module}.{key}"].dtype) for key in ("weight", "weights_scaling_factor")} == {
            "weight": "uint8",
            "weights_scaling_factor": "float8_e4m3fn",
        }
    assert ours[f"{layer}attention.kv_cache_scaling_factor"].tolist() == [0.75]
    assert {str(ours[name].dtype) for name in ("transformer.vocab_embedding.weight", "lm_head.weight")} == {"float16"}
    assert quantization(tmp_path / "out")["kv_cache_quant_algo"] == "FP8"


def test_dequantized_in_stages_and_with_shared_kv_heads(tmp_path: Path) -> None:
    for number, (name, size) in enumerate([("gptq asymmetric", {"tp_size": 4}), ("awq", {"tp_size": 2, "pp_size": 2})]):
        check_stands_for(name, tmp_path / str(number), dequantize=True, **size)


def test_act_order_is_dequantized(tmp_path: Path) -> None:
    kinds = [source.gptq(index="order"), source.gptq(index="order", sym=False, bits=8), source.gptq(index="order", bits=3)]
    for number, kind in enumerate([*kinds, source.compressed(order=True, sym=False)]):
        check_stands_for(kind, tmp_path / str(number), tp_size=2, dequantize=True)


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


@pytest.mark.parametrize("to", AGAIN)
@pytest.mark.parametrize(
    "name",
    [
        "gptq",
        "gptq 8 bits asymmetric",
        "awq",
        "compressed w8a8",
        "modelopt fp8",
        "modelopt awq",
        "fbgemm",
        "fp8 block",
        "nvfp4",
        "mxfp4",
    ],
)
def test_dequantized_and_quantized_in_another_way(name: str, to: str, tmp_path: Path) -> None:
    flags, algorithm = AGAIN[to]
    check_stands_for(name, tmp_path, tp_size=2, dequantize=True, **flags)
    expected = {**BLOCK, "quant_algo": algorithm, **BY_ALGORITHM[algorithm], "use_meta_recipe": to == "fp8 meta"}
    assert quantization(tmp_path / "ours") == expected


# --- numbers to codes


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weight_only(precision: str, dtype: str, tp: int, tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": dtype}
    weights = hard(source.values(config))
    checkpoints.save(tmp_path / "model", config, weights)
    flags, algorithm = AGAIN[precision]
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=tp, scheduler="threads", **flags)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": algorithm}
    for rank in range(tp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, config, rank, tp).items():
            check_integers(ours, module, wanted.astype(np.float16 if dtype == "float32" else wanted.dtype), int(precision[3:]))


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


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float8_by_row(dtype: str, tp: int, tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": dtype, "num_hidden_layers": 3}
    weights = hard(source.values(config))
    checkpoints.save(tmp_path / "model", config, weights)
    for recipe in (False, True):
        output = tmp_path / str(recipe)
        flags = {"use_fp8_rowwise": True, "use_meta_fp8_rowwise_recipe": recipe}
        convert(model_dir=tmp_path / "model", output_dir=output, tp_size=tp, scheduler="threads", **flags)
        for rank in range(tp):
            ours = read(output / f"rank{rank}.safetensors")
            check_rows(ours, cut(weights, config, rank, tp), recipe)


def check_rows(ours: Arrays, wanted: dict[str, np.ndarray], recipe: bool) -> None:
    clamps = {name for name in ours if name.endswith("clamp_val")}
    expected = set()
    for module, weight in wanted.items():
        kept = recipe and (".attention." in module or ".layers.1." not in module)
        if kept:
            np.testing.assert_array_equal(ours[f"{module}.weight"], weight)
            continue
        codes, scales = by_row(weight)
        np.testing.assert_array_equal(ours[f"{module}.weight"].astype(np.float32), codes)
        np.testing.assert_array_equal(ours[f"{module}.per_channel_scale"], scales)
        layer, short = module.rsplit(".", 2)[0], module.rsplit(".", 2)[1]
        norm = {"attention": "input_layernorm", "mlp": "post_layernorm"}[short]
        expected |= {f"{layer}.{short}.clamp_val", f"{layer}.{norm}.clamp_val"}
    assert clamps == expected
    assert all(ours[name].tolist() == [-1200.0, 1200.0] and ours[name].dtype == np.float32 for name in clamps)


def test_the_bound_of_activations_is_the_source_s(tmp_path: Path) -> None:
    kind, config = source.fbgemm(bound=900.0), of("fbgemm")
    source.write(tmp_path / "model", config, kind)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", **kind.flags)
    assert quantization(tmp_path / "out")["clamp_val"] == [-900.0, 900.0]
    assert read(tmp_path / "out/rank0.safetensors")["transformer.layers.1.mlp.clamp_val"].tolist() == [-900.0, 900.0]


# --- groups that follow the activations


def signal_to_noise(found: np.ndarray, wanted: np.ndarray) -> float:
    """Decibels."""
    return float(10 * math.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


@pytest.mark.parametrize("more", [{}, {"group_size": 64}, {"tp_size": 2}, {"dtype": "bfloat16", "sm": 90}], ids=str)
def test_act_order_is_quantized_again(more: dict[str, Any], tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LLAMA, source.gptq(index="order", sym=False))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", requantize=True, scheduler="threads", **more)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": "W4A16_GPTQ", **GROUPED}
    tp = more.get("tp_size", 1)
    for rank in range(tp):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, LLAMA, rank, tp).items():
            assert signal_to_noise(matrix(ours, module, more.get("sm", 80)), wanted) > 17, module
            assert not np.any(ours[f"{module}.zero"].astype(np.float32))
    note, *of_gpus = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    assert len(of_gpus) == ("sm" not in more)
    assert 17 < float(re.findall(r"([\d.]+) dB", note)[0]) < 30, note


def test_plain_gptq_is_quantized_again_with_other_groups(tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", LLAMA, source.gptq(group=128))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", requantize=True, group_size=64, scheduler="threads")
    ours = read(tmp_path / "out/rank0.safetensors")
    for module, wanted in cut(weights, LLAMA, 0, 1).items():
        assert ours[f"{module}.weights_scaling_factor"].shape == (wanted.shape[1] // 64, wanted.shape[0])
        assert signal_to_noise(matrix(ours, module), wanted) > 17


# --- GPU generations


@pytest.mark.parametrize("flags", [{}, AGAIN["int8"][0], AGAIN["int4"][0]], ids=["gptq", "int8", "int4"])
def test_generations(flags: dict[str, Any], tmp_path: Path) -> None:
    if flags:
        weights = source.values(LLAMA)
        checkpoints.save(tmp_path / "model", LLAMA, weights)
    else:
        weights = source.write(tmp_path / "model", LLAMA, FORMATS["gptq asymmetric"])
    written, ranks = {}, {}
    for sm in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / str(sm), sm=sm, tp_size=2, scheduler="threads", **flags)
        written[sm] = contents(tmp_path / str(sm))
        said = json.loads((tmp_path / str(sm) / "headrace.json").read_text())
        assert said["options"]["sm"] == sm
        verify(tmp_path / str(sm), tmp_path / "model").check()
        ranks[sm] = read(tmp_path / f"{sm}/rank1.safetensors")
    for sm, each in written.items():
        like = {90: 90, 100: 100, 103: 100}.get(sm, 80)
        assert each == written[like], sm
        assert each["config.json"] == written[80]["config.json"]
    for module in cut(weights, LLAMA, 1, 2):
        for sm in (90, 100):
            np.testing.assert_array_equal(matrix(ranks[sm], module, sm), matrix(ranks[80], module, 80))
        first, *others = (ranks[sm][f"{module}.weight"].tobytes() for sm in (80, 90, 100))
        assert len({first, *others}) == 3


def test_the_generation_does_not_matter_for_float8(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["compressed fp8"])
    for sm in (80, 90, 100, "any"):
        convert(model_dir=tmp_path / "model", output_dir=tmp_path / str(sm), sm=sm, scheduler="threads")
    assert contents(tmp_path / "80") == contents(tmp_path / "90") == contents(tmp_path / "100") == contents(tmp_path / "any")


# --- the key-value cache


def test_scales_of_the_cache(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["modelopt fp8"])
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "pp_size": 2, "scheduler": "threads"}
    convert(output_dir=tmp_path / "with", fp8_kv_cache=True, **options)
    convert(output_dir=tmp_path / "without", **options)
    assert quantization(tmp_path / "with")["kv_cache_quant_algo"] == "FP8"
    assert quantization(tmp_path / "without")["kv_cache_quant_algo"] is None
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    for rank in range(4):
        held = read(tmp_path / f"with/rank{rank}.safetensors")
        # The larger of the two: keys of the first layer have 0.75, those of the second 1.75.
        assert held.pop(name).tolist() == [0.75 + rank // 2]
        plain = read(tmp_path / f"without/rank{rank}.safetensors")
        assert held.keys() == plain.keys()
        assert all(np.array_equal(held[key].view(np.uint8), plain[key].view(np.uint8)) for key in plain)


@pytest.mark.parametrize("name", ["float", "gptq", "compressed fp8"])
def test_a_cache_without_scales_has_ones(name: str, tmp_path: Path) -> None:
    if name == "float":
        checkpoints.save(tmp_path / "model", LLAMA, source.values(LLAMA))
    else:
        source.write(tmp_path / "model", LLAMA, FORMATS[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", fp8_kv_cache=True, tp_size=2, scheduler="threads")
    assert quantization(tmp_path / "out")["kv_cache_quant_algo"] == "FP8"
    for rank in range(2):
        held = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(2):
            scale = held[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
            assert (scale.tolist(), scale.dtype) == ([1.0], np.float32)


def test_scales_of_the_cache_outlive_dequantization(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, FORMATS["modelopt fp8"])
    options = {"dequantize": True, "fp8_kv_cache": True, "scheduler": "threads"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **options)
    held = read(tmp_path / "out/rank0.safetensors")
    assert held["transformer.layers.1.attention.kv_cache_scaling_factor"].tolist() == [1.75]


# --- families: fused tensors, biases, experts


PHI = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
INTERNLM = {**LLAMA, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
INTERNLM_NAMES = {
    "model.embed_tokens.": "model.tok_embeddings.",
    "lm_head.": "output.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}
OUT = {"qweight": 1, "qzeros": 1, "scales": 1}  # where packed parameters have the out-features, when it is not the first axis


def fused(stored: Arrays, layers: int, names: dict[str, tuple[str, ...]], groups: int = 1) -> Arrays:
    """Parts `names[fused]` as one tensor each, their rows one after the other, in `groups` repetitions; the rest as it is."""
    result = dict(stored)
    for layer in range(layers):
        for whole, parts in names.items():
            prefix = f"model.layers.{layer}."
            parameters = [name.rpartition(".")[2] for name in stored if name.startswith(f"{prefix}{parts[0]}.")]
            for parameter in parameters:
                values = [result.pop(f"{prefix}{part}.{parameter}") for part in parts]
                if parameter in ("g_idx", "weight_shape"):
                    rows = sum(int(value[0]) for value in values)
                    result[f"{prefix}{whole}.{parameter}"] = values[0] if parameter == "g_idx" else np.array([rows, values[0][1]])
                    continue
                axis = OUT.get(parameter, 0)
                shares = [np.split(value, groups, axis=axis) for value in values]
                joined = np.concatenate([share[n] for n in range(groups) for share in shares], axis=axis)
                result[f"{prefix}{whole}.{parameter}"] = joined
    return result


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED_PHI = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
FUSED = {
    "gptq": source.gptq(sym=False),
    "gptq without g_idx": source.gptq(sym=False, index="none"),
    "gptq 8 bits": source.gptq(bits=8, index="none"),
    "gptq zero biases": source.gptq(bias=True, index="none"),
    "awq": source.awq(),
    "compressed w4a16": source.compressed(sym=False),
    "compressed fp8 dynamic": source.compressed_float8(dynamic=True),
    "modelopt awq": source.modelopt_awq(),
    "mxfp4": source.mxfp4(),
}


@pytest.mark.parametrize("more", [{"tp_size": 1}, {"tp_size": 2}, {"tp_size": 2, "dequantize": True}], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_phi3_is_llama_with_fused_tensors(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    kind = FUSED[name]
    stored, _ = source.quantized(source.values(LLAMA), kind, 2)
    checkpoints.save(tmp_path / "llama", source.described(LLAMA, kind), stored)
    checkpoints.save(tmp_path / "phi", source.described(PHI, kind), fused(stored, 2, FUSED_PHI))
    for model in ("llama", "phi"):
        convert(model_dir=tmp_path / model, output_dir=tmp_path / f"out-{model}", scheduler="threads", **more)
    assert quantization(tmp_path / "out-phi") == quantization(tmp_path / "out-llama")
    for rank in range(more["tp_size"]):
        ours, theirs = (read(tmp_path / f"out-{model}/rank{rank}.safetensors") for model in ("phi", "llama"))
        # The factor comes above the activated half: one tensor of both, whose codes are as many bytes after one another.
        for name_ in [name for name in theirs if ".mlp.gate." in name]:
            up, gate = theirs.pop(name_), theirs.pop(name_.replace(".gate.", ".fc."))
            key = name_.replace(".gate.", ".fc.")
            if key.endswith(".weight"):
                assert ours.pop(key).tobytes() == up.tobytes() + gate.tobytes()
            elif key.endswith("prequant_scaling_factor"):
                assert ours.pop(key).tobytes() == up.tobytes() == gate.tobytes()
            else:
                axis = 0 if name == "modelopt awq" else -1
                np.testing.assert_array_equal(ours.pop(key), np.concatenate([up, gate], axis=axis))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


@pytest.mark.parametrize("more", [{"tp_size": 1}, {"tp_size": 4}, {"tp_size": 2, "dequantize": True}], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_internlm2_is_llama_with_rows_by_kv_head(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    kind = FUSED[name]
    stored, _ = source.quantized(source.values(LLAMA), kind, 2)
    checkpoints.save(tmp_path / "llama", source.described(LLAMA, kind), stored)
    renamed = fused(stored, 2, {"attention.wqkv": QKV}, groups=LLAMA["num_key_value_heads"])
    for theirs, ours in INTERNLM_NAMES.items():
        renamed = {key.replace(theirs, ours): values for key, values in renamed.items()}
    checkpoints.save(tmp_path / "intern", source.described(INTERNLM, kind), renamed)
    for model in ("llama", "intern"):
        convert(model_dir=tmp_path / model, output_dir=tmp_path / f"out-{model}", scheduler="threads", **more)
    for path in (tmp_path / "out-llama").glob("*.safetensors"):
        assert (tmp_path / "out-intern" / path.name).read_bytes() == path.read_bytes()
    ours = json.loads((tmp_path / "out-intern/config.json").read_text())["quantization"]
    theirs = quantization(tmp_path / "out-llama")
    assert ours == {key: value for key, value in theirs.items() if key == "quant_algo" or value != BLOCK[key]}


def test_groups_by_act_order_of_a_fused_tensor_are_dequantized(tmp_path: Path) -> None:
    kind = source.gptq(index="order", sym=False)
    stored, stands_for = source.quantized(source.values(LLAMA), kind, 2)
    # Fused, q, k and v are quantized in one order.
    for layer in range(2):
        for parts in FUSED_PHI.values():
            names = [f"model.layers.{layer}.{part}" for part in parts]
            together = source.values(LLAMA)
            weights = np.concatenate([together[f"{name}.weight"] for name in names]).astype(np.float32)
            packed = kind.quantizer(names[0], weights)
            sizes = np.cumsum([len(together[f"{name}.weight"]) for name in names])[:-1]
            for name, part in zip(names, np.split(packed.weight, sizes), strict=True):
                stands_for[f"{name}.weight"] = part
            whole = f"model.layers.{layer}.{next(key for key, value in FUSED_PHI.items() if value == parts)}"
            stored = {key: values for key, values in stored.items() if key.rpartition(".")[0] not in names}
            stored |= {f"{whole}.{key}": np.ascontiguousarray(values) for key, values in packed.parameters.items()}
    checkpoints.save(tmp_path / "phi", source.described(PHI, kind), stored)
    plain = fused(stands_for, 2, FUSED_PHI)
    source.write_float(tmp_path / "float", PHI, plain)
    convert(model_dir=tmp_path / "phi", output_dir=tmp_path / "ours", scheduler="threads", tp_size=2, dequantize=True)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", scheduler="threads", tp_size=2)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["nvfp4", "compressed nvfp4", "fp8 block", "bitsandbytes nf4"])
@pytest.mark.parametrize("more", [{"tp_size": 1}, {"tp_size": 2, "dequantize": True}], ids=str)
def test_small_floats_of_fused_tensors(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    kind, plain = FORMATS[name], fused(source.values(LLAMA), 2, FUSED_PHI)
    stored, stands_for = source.quantized(plain, kind, 2)
    checkpoints.save(tmp_path / "model", source.described(PHI, kind), stored)
    for file, content in kind.files.items():
        (tmp_path / "model" / file).write_text(json.dumps(content))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", scheduler="threads", **more)
    source.write_float(tmp_path / "float", PHI, stands_for)
    size = more["tp_size"]
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", scheduler="threads", dtype="float32", tp_size=size)
    algorithm = quantization(tmp_path / "ours")["quant_algo"]
    assert algorithm == (None if more.get("dequantize") else kind.algorithm or None)
    for rank in range(more["tp_size"]):
        ours, theirs = (read(tmp_path / side / f"rank{rank}.safetensors") for side in ("ours", "theirs"))
        for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj"):
            wanted = theirs[f"transformer.layers.1.{module}.weight"]
            found = matrix(ours, f"transformer.layers.1.{module}")
            np.testing.assert_array_equal(found, wanted if algorithm else wanted.astype(np.float16))


def test_scales_of_scales_of_a_fused_tensor_are_refused(tmp_path: Path) -> None:
    kind = FORMATS["bitsandbytes nf4 nested"]
    stored, _ = source.quantized(fused(source.values(LLAMA), 2, FUSED_PHI), kind, 2)
    checkpoints.save(tmp_path / "model", source.described(PHI, kind), stored)
    with pytest.raises(BadInput) as error:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert {problem.subject.rpartition(".")[2] for problem in error.value.problems} == {"nested_absmax"}


def test_parts_that_share_a_tile_are_refused(tmp_path: Path) -> None:
    """A kv head of 64 rows is half a tile of 128: no scale is its own."""
    plain = fused(source.values(LLAMA), 2, {"attention.wqkv": QKV}, groups=LLAMA["num_key_value_heads"])
    for theirs, ours in INTERNLM_NAMES.items():
        plain = {key.replace(theirs, ours): values for key, values in plain.items()}
    stored: Arrays = {}
    for name, values in plain.items():
        packed = FORMATS["fp8 block"].quantizer(name, values.astype(np.float32)).parameters if "wqkv" in name else {}
        stored |= {f"{name.removesuffix('.weight')}.{key}": value for key, value in packed.items()} or {name: values}
    checkpoints.save(tmp_path / "model", source.described(INTERNLM, FORMATS["fp8 block"]), stored)
    with pytest.raises(BadInput) as error:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert {problem.subject.rpartition(".")[2] for problem in error.value.problems} == {"weight_scale_inv"}
    assert "bounds of its 3 parts" in error.value.problems[0].expected


def test_float8_of_fused_tensors_with_one_scale(tmp_path: Path) -> None:
    kind = source.modelopt_float8(cache=False)
    plain = fused(source.values(LLAMA), 2, FUSED_PHI)
    stored: Arrays = {}
    for name, values in plain.items():
        module = name.removesuffix(".weight")
        packed = "proj" in module and kind.quantizer(module, values.astype(np.float32)).parameters
        stored |= {f"{module}.{key}": value for key, value in packed.items()} if packed else {name: values}
    checkpoints.save(tmp_path / "model", PHI, stored)
    for name, content in kind.files.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == "FP8"
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(2):
            theirs, layer_ = f"model.layers.{layer}.", f"transformer.layers.{layer}."
            qkv, both = (stored[f"{theirs}{whole}.weight"].view(np.uint8) for whole in FUSED_PHI)
            q, k, v = (np.split(part, 2)[rank] for part in np.split(qkv, [256, 384]))
            gate, up = (np.split(part, 2)[rank] for part in np.split(both, 2))
            wanted = {"attention.qkv": [q, k, v], "mlp.fc": [up, gate]}
            for (module, parts), whole in zip(wanted.items(), FUSED_PHI, strict=True):
                np.testing.assert_array_equal(ours[f"{layer_}{module}.weight"].view(np.uint8), np.concatenate(parts))
                assert ours[f"{layer_}{module}.weights_scaling_factor"] == [stored[f"{theirs}{whole}.weight_scale"]]
                assert ours[f"{layer_}{module}.activation_scaling_factor"] == [stored[f"{theirs}{whole}.input_scale"]]


def mixed(directory: Path, kind: Format, module: str, other: Format | None) -> Arrays:
    """A checkpoint one module of which is not quantized, or in another format; returns what it stands for."""
    tensors = source.values(LLAMA)
    stored, stands_for = source.quantized(tensors, kind, 2)
    stored = {name: values for name, values in stored.items() if not name.startswith(f"{module}.")}
    packed = other.quantizer(module, tensors[f"{module}.weight"].astype(np.float32)) if other else None
    own = packed.parameters if packed else {"weight": tensors[f"{module}.weight"]}
    stored |= {f"{module}.{key}": np.ascontiguousarray(values) for key, values in own.items()}
    stands_for[f"{module}.weight"] = packed.weight if packed else tensors[f"{module}.weight"]
    checkpoints.save(directory, source.described(LLAMA, kind), stored)
    return stands_for


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize(
    ("name", "other", "algorithm"),
    [
        ("awq", source.gptq(), "W4A16_GPTQ"),
        ("gptq", source.awq(), "W4A16_GPTQ"),
        ("compressed fp8 dynamic", source.modelopt_float8(cache=False), "FP8_PER_CHANNEL_PER_TOKEN"),
    ],
    ids=["gptq among awq", "awq among gptq", "one scale among rows"],
)
def test_formats_of_one_algorithm_go_together(name: str, other: Format, algorithm: str, module: str, tmp_path: Path) -> None:
    weights = mixed(tmp_path / "model", FORMATS[name], module, other)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == algorithm
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            assert np.allclose(matrix(ours, target), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags", [{"dequantize": True}, {"requantize": True}, {"dequantize": True, "use_fp8_rowwise": True}], ids=str
)
def test_a_module_that_is_not_quantized_joins_the_others(flags: dict[str, Any], tmp_path: Path) -> None:
    weights = mixed(tmp_path / "model", FORMATS["gptq asymmetric"], "model.layers.0.self_attn.k_proj", None)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2, **flags)
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            assert signal_to_noise(matrix(ours, target), wanted.astype(np.float32)) > 17


def test_numbers_that_no_recipe_keeps_are_spoken_of(tmp_path: Path) -> None:
    mixed(tmp_path / "model", FORMATS["compressed fp8 dynamic"], "model.layers.1.mlp.down_proj", None)
    options = {"model_dir": tmp_path / "model", "scheduler": "threads"}
    convert(output_dir=tmp_path / "out", **options)
    (note,) = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    assert "1 matrices (0 of attention, 1 of the MLP), the first transformer.layers.1.mlp.proj" in note
    assert "--use_meta_fp8_rowwise_recipe keeps them" in note, "layer 1 is the last"
    config = {**LLAMA, "num_hidden_layers": 3}
    stored, _ = source.quantized(source.values(config), FORMATS["compressed fp8 dynamic"], 3)
    stored = {name: values for name, values in stored.items() if not name.startswith("model.layers.1.mlp.down_proj.")}
    stored["model.layers.1.mlp.down_proj.weight"] = source.values(config)["model.layers.1.mlp.down_proj.weight"]
    checkpoints.save(tmp_path / "deep", source.described(config, FORMATS["compressed fp8 dynamic"]), stored)
    convert(model_dir=tmp_path / "deep", output_dir=tmp_path / "other", scheduler="threads")
    (note,) = json.loads((tmp_path / "other/headrace.json").read_text())["notes"]
    assert "no option keeps them" in note


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_one_scale_is_one_of_each_row_among_others_that_have_these(module: str, tmp_path: Path) -> None:
    weights = mixed(tmp_path / "model", FORMATS["compressed fp8"], module, source.compressed_float8(dynamic=True))
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out")["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for target, wanted in cut(weights, LLAMA, rank, 2).items():
            np.testing.assert_array_equal(matrix(ours, target), wanted)


def test_without_metas_recipe_all_of_its_checkpoint_is_float8(tmp_path: Path) -> None:
    config, kind = of("fbgemm"), FORMATS["fbgemm"]
    weights = source.write(tmp_path / "model", config, kind)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": kind.algorithm, **BY_ALGORITHM[kind.algorithm]}
    # Attention of three layers (q, k, v and o), and the MLP of the first and the last.
    (note,) = json.loads((tmp_path / "out/headrace.json").read_text())["notes"]
    assert "18 matrices (12 of attention, 6 of the MLP)" in note
    assert "modules_to_not_convert" in note
    assert note.endswith("--use_meta_fp8_rowwise_recipe keeps them in 16 bits")
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "kept", scheduler="threads", **kind.flags)
    assert json.loads((tmp_path / "kept/headrace.json").read_text())["notes"] == []
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(3):
            assert all(f"transformer.layers.{layer}.{norm}.clamp_val" in ours for norm in ("input_layernorm", "post_layernorm"))
        for target, wanted in cut(weights, config, rank, 2).items():
            if wanted.dtype == np.float32:
                np.testing.assert_array_equal(matrix(ours, target), wanted)
                continue
            codes, scales = by_row(wanted)
            np.testing.assert_array_equal(ours[f"{target}.weight"].astype(np.float32), codes)
            np.testing.assert_array_equal(ours[f"{target}.per_channel_scale"], scales)


def test_qwen2_keeps_its_biases_and_drops_those_of_zeros(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    kind = source.gptq(bias=True, sym=False)
    weights = source.write(tmp_path / "model", config, kind)
    stored, _ = source.quantized(source.values(LLAMA), source.gptq(bias=True, sym=False), 2)
    random = np.random.default_rng(8)
    biases = {name: random.standard_normal(len(values)).astype(np.float16) for name, values in stored.items() if
              name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}  # fmt: skip
    checkpoints.save(tmp_path / "model", source.described(config, kind), {**stored, **biases})
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=4)
    for rank in range(4):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        assert {name.removeprefix("transformer.layers.0.") for name in ours if name.endswith("bias") and ".0." in name} == {
            "attention.qkv.bias"
        }
        for layer in range(2):
            q, k, v = (biases[f"model.layers.{layer}.self_attn.{part}_proj.bias"] for part in "qkv")
            wanted = np.concatenate([np.split(q, 4)[rank], np.split(k, 2)[rank // 2], np.split(v, 2)[rank // 2]])
            np.testing.assert_array_equal(ours[f"transformer.layers.{layer}.attention.qkv.bias"], wanted)
        for module, wanted in cut(weights, config, rank, 4).items():
            assert signal_to_noise(matrix(ours, module), wanted.astype(np.float32)) > 50
    left = json.loads((tmp_path / "out/headrace.json").read_text())["left_out"]
    assert sum(name.endswith(".bias") for name in left) == 2 * 4


def test_biases_of_zeros_change_nothing(tmp_path: Path) -> None:
    for name in ("with", "without"):
        source.write(tmp_path / name, LLAMA, source.gptq(bias=name == "with"))
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"out-{name}", scheduler="threads", tp_size=2)
    assert contents(tmp_path / "out-with") == contents(tmp_path / "out-without")


@pytest.mark.parametrize("index", ["trivial", "order"])
def test_a_quantized_head_is_dequantized(index: str, tmp_path: Path) -> None:
    kind = source.gptq(sym=False)
    tensors = source.values(LLAMA)
    stored, stands_for = source.quantized(tensors, kind, 2)
    head = source.gptq(sym=False, index=index).quantizer("lm_head", tensors["lm_head.weight"].astype(np.float32))
    del stored["lm_head.weight"]
    stored |= {f"lm_head.{key}": np.ascontiguousarray(values) for key, values in head.parameters.items()}
    checkpoints.save(tmp_path / "model", source.described(LLAMA, kind), stored)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", tp_size=2)
    wanted = head.weight.astype(np.float16)
    for rank in range(2):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        np.testing.assert_array_equal(ours["lm_head.weight"], np.split(wanted, 2)[rank])
    assert stands_for["lm_head.weight"].dtype == np.float16


SHARES = {
    "tp1": {"tp_size": 1},
    "tp2": {"tp_size": 2},
    "ep2": {"tp_size": 2, "moe_ep_size": 2},
    "tp4": {"tp_size": 4, "moe_ep_size": 2},
}


def expert_shares(config: dict[str, Any], more: dict[str, int], rank: int) -> Iterator[tuple[int, int, int]]:
    """The experts of a rank, and which of how many parts of each it has: (expert, part, parts)."""
    experts, ep = config["num_local_experts"], more.get("moe_ep_size", 1)
    parts = more["tp_size"] // ep
    for expert in range(rank % ep * experts // ep, (rank % ep + 1) * experts // ep):
        yield expert, rank // ep, parts


def expert_matrices(
    weights: Arrays, prefix: str, names: tuple[str, str, str], part: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """An expert's two matrices on a rank: the factor above the activated half, and the projection back."""
    gate, up, down = (weights[f"{prefix}.{name}.weight"] for name in names)
    return np.concatenate([np.split(up, parts)[part], np.split(gate, parts)[part]]), np.split(down, parts, axis=1)[part]


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_mixtral_weight_only(precision: str, share: str, sm: int, tmp_path: Path) -> None:
    weights, more, bits = hard(source.values(MIXTRAL)), SHARES[share], int(precision[3:])
    checkpoints.save(tmp_path / "model", MIXTRAL, weights)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", sm=sm, **AGAIN[precision][0], **more)
    for rank in range(more["tp_size"]):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for module, wanted in cut(weights, MIXTRAL, rank, more["tp_size"]).items():
            check_integers(ours, module, wanted, bits, sm)
        for layer in range(2):
            names = f"transformer.layers.{layer}.mlp.fc", f"transformer.layers.{layer}.mlp.proj"
            assert ours[f"transformer.layers.{layer}.mlp.router.weight"].dtype == np.float32
            for place, (expert, part, parts) in enumerate(expert_shares(MIXTRAL, more, rank)):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                for name, wanted in zip(names, expert_matrices(weights, prefix, ("w1", "w3", "w2"), part, parts), strict=True):
                    held = {f"m.{key}": ours[f"{name}.{key}"][place] for key in ("weight", "per_channel_scale")}
                    # Stacks are arranged as for Ampere, whatever the generation.
                    check_integers(held, "m", wanted, bits, 80)
            assert len(ours[f"{names[0]}.weight"]) == MIXTRAL["num_local_experts"] // more.get("moe_ep_size", 1)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["gptq asymmetric", "awq"])
def test_mixtral_with_packed_experts(name: str, share: str, sm: int, tmp_path: Path) -> None:
    more = SHARES[share]
    weights = source.write(tmp_path / "model", MIXTRAL, FORMATS[name])
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", sm=sm, **more)
    assert quantization(tmp_path / "out") == {**BLOCK, "quant_algo": "W4A16_GPTQ", **GROUPED}
    for rank in range(more["tp_size"]):
        ours = read(tmp_path / f"out/rank{rank}.safetensors")
        for layer in range(2):
            fc, proj = (matrix(ours, f"transformer.layers.{layer}.mlp.{each}") for each in ("fc", "proj"))
            shares = list(expert_shares(MIXTRAL, more, rank))
            assert len(fc) == len(proj) == len(shares)
            for place, (expert, part, parts) in enumerate(shares):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                wanted = expert_matrices(weights, prefix, ("w1", "w3", "w2"), part, parts)
                assert all(signal_to_noise(each[place], want) > 50 for each, want in zip((fc, proj), wanted, strict=True))


def test_mixtral_dequantized(tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", MIXTRAL, FORMATS["gptq asymmetric"])
    source.write_float(tmp_path / "float", MIXTRAL, weights)
    options = {"tp_size": 4, "moe_ep_size": 2, "scheduler": "threads"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", dequantize=True, **options)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", **options)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


SMALL = {**LLAMA, "hidden_size": 128, "intermediate_size": 256}
QWEN_MOE = {
    **SMALL,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 192,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


def qwen_moe() -> Arrays:
    """Qwen2-MoE: LLaMA's attention with biases, experts of their own size, and one that every token goes through."""
    random = np.random.default_rng(4)
    tensors = {name: values for name, values in source.values(SMALL).items() if ".mlp." not in name}

    def matrix_of(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.05).astype(np.float16)

    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        sizes = {f"experts.{e}": 128 for e in range(4)} | {"shared_expert": 192}
        for name, inner in sizes.items():
            tensors |= {f"{mlp}{name}.{part}_proj.weight": matrix_of(inner, 128) for part in ("gate", "up")}
            tensors[f"{mlp}{name}.down_proj.weight"] = matrix_of(128, inner)
        tensors |= {f"{mlp}gate.weight": matrix_of(4, 128), f"{mlp}shared_expert_gate.weight": matrix_of(1, 128)}
        for part, size in (("q", 256), ("k", 128), ("v", 128)):
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = matrix_of(size)
    return tensors


@pytest.mark.parametrize("kind", ["int8", "int4", "gptq"])
def test_qwen2_moe(kind: str, tmp_path: Path) -> None:
    weights = hard(qwen_moe())
    flags: dict[str, Any] = {}
    if kind == "gptq":
        stored, weights = source.quantized(qwen_moe(), FORMATS["gptq asymmetric"], 2)
        checkpoints.save(tmp_path / "model", source.described(QWEN_MOE, FORMATS["gptq asymmetric"]), stored)
    else:
        checkpoints.save(tmp_path / "model", QWEN_MOE, weights)
        flags = AGAIN[kind][0]
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads", **flags)
    ours = read(tmp_path / "out/rank0.safetensors")
    names = ("gate_proj", "up_proj", "down_proj")
    for layer in range(2):
        mlp, theirs = f"transformer.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        wanted = {}
        for expert in range(4):
            wanted["fc", expert], wanted["proj", expert] = expert_matrices(weights, f"{theirs}.experts.{expert}", names, 0, 1)
        for (name, expert), weight in wanted.items():
            held = {
                f"m.{key.rpartition('.')[2]}": values[expert] for key, values in ours.items() if key.startswith(f"{mlp}.{name}.")
            }
            check_kind(held, "m", weight, kind)
        shared = expert_matrices(weights, f"{theirs}.shared_expert", names, 0, 1)
        for name, weight in zip(("fc", "proj"), shared, strict=True):
            check_kind(ours, f"{mlp}.shared_expert.{name}", weight, kind)
        assert ours[f"{mlp}.shared_expert_gate.weight"].dtype == np.float16
        assert ours[f"{mlp}.router.weight"].dtype == np.float32


def check_kind(ours: Arrays, module: str, weight: np.ndarray, kind: str) -> None:
    if kind == "gptq":
        assert signal_to_noise(matrix(ours, module), weight) > 50
    else:
        check_integers(ours, module, weight, int(kind[3:]))


# --- other sources


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_is_quantized_as_the_checkpoint_that_it_holds(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    from tests.stages.read.test_gguf_conversion import back

    held = back(config, gguf_files.write(tmp_path / "model.gguf", config, source.values(config), kind))
    checkpoints.save(tmp_path / "model", config, held)
    options = {"tp_size": 2, "dtype": "bfloat16", "scheduler": "threads", **AGAIN["int8"][0]}
    convert(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "ours", **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "theirs", **options)
    for rank in range(2):
        ours, theirs = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs


@pytest.mark.parametrize("scheduler", ["threads", "local"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_model_in_memory_is_quantized_as_the_directory_that_it_saves(kind: str, scheduler: str, tmp_path: Path) -> None:
    import transformers

    config = MIXTRAL if kind == "mixtral" else LLAMA
    torch.manual_seed(0)
    of_class = {"mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM)}.get(
        kind, (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    )
    settings = {
        key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype", "rope_theta")
    }
    model = of_class[1](of_class[0](**settings)).to(torch.float16)
    model.save_pretrained(tmp_path / "model")
    options = {"tp_size": 2, "scheduler": scheduler, **AGAIN["int4"][0]}
    convert(model=model, output_dir=tmp_path / "ours", **options)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "theirs", **options)
    for rank in range(2):
        ours, theirs = ((tmp_path / side / f"rank{rank}.safetensors").read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs
