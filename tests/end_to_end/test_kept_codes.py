"""Codes that a format and a TensorRT-LLM algorithm share reach the ranks as they are; those that no kernel reads do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import BadInput, convert
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import LLAMA, Arrays, Format
from tests.support.rank_files import TYPES, read
from tests.support.rank_matrices import (
    AGAIN,
    BLOCK,
    BY_ALGORITHM,
    FORMATS,
    GROUPED,
    NATIVE,
    as_float8,
    check_integers,
    check_stands_for,
    codes_of,
    cut,
    matrix,
    of,
    quantization,
    signal_to_noise,
)

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
        assert np.all(np.abs(found - wanted) <= np.abs(scale) * 0.15)
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
