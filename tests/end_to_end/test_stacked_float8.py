"""Float8 experts that no kernel takes as they are: transformers 5's stacks, and those whose activations have no scale."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import BadInput, convert, plan
from pipeline.reporting.verification import verify
from tests.end_to_end.test_float8_experts import NAMES, qwen_values
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.directories import contents
from tests.support.quantized_checkpoints import MIXTRAL, Arrays
from tests.support.rank_matrices import AGAIN, quantization

TILES = source.block_float8()
SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def one_scale(module: str, weight: np.ndarray) -> source.Packed:  # noqa: ARG001
    """Float8 with one scale for all of a matrix, [1, 1]."""
    codes, scale, stands_for = source.by_tile(weight, max(weight.shape), np.dtype(np.float32))
    return source.Packed({"weight": codes, "weight_scale_inv": scale}, stands_for)


def stacked(directory: Path, family: str, quantizer: source.Quantizer) -> tuple[dict[str, Any], Arrays]:
    """A checkpoint with a stack for each projection, and no module around it; returns what it stands for, expert by expert."""
    config, place, (gate, up, down) = NAMES[family]
    plain = source.values(MIXTRAL) if family == "mixtral" else qwen_values()
    stored, stands_for = dict(plain), dict(plain)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.{place}"
        stacks: dict[str, list[source.Packed]] = {"gate_up_proj": [], "down_proj": []}
        for expert in range(4):
            parts = {name: stored.pop(f"{prefix}.{expert}.{name}.weight").astype(np.float32) for name in (gate, up, down)}
            both = quantizer("", np.concatenate([parts[gate], parts[up]]))
            back = quantizer("", parts[down])
            halves = np.split(both.weight, 2)
            for name, weight in zip((gate, up, down), (*halves, back.weight), strict=True):
                stands_for[f"{prefix}.{expert}.{name}.weight"] = weight
            stacks["gate_up_proj"].append(both)
            stacks["down_proj"].append(back)
        for name, packed in stacks.items():
            stack = f"model.layers.{layer}.mlp.experts.{name}"
            stored[stack] = np.stack([each.parameters["weight"] for each in packed])
            stored[f"{stack}_scale_inv"] = np.stack([each.parameters["weight_scale_inv"] for each in packed])
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        if router in stored:
            stored[router.replace("block_sparse_moe", "mlp")] = stored.pop(router)
    checkpoints.save(directory, {**config, "quantization_config": SETTINGS}, stored)
    return config, stands_for


@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("mixtral", TILES.quantizer, {"tp_size": 2}),
        ("qwen3_moe", TILES.quantizer, {"tp_size": 4, "moe_ep_size": 2, **AGAIN["int8"][0]}),
        ("qwen3_moe", one_scale, {"tp_size": 2, "moe_ep_size": 2}),
        pytest.param("mixtral", one_scale, {"tp_size": 2, **AGAIN["int4"][0]}, marks=pytest.mark.nightly),
    ],
)
def test_stacks_are_the_experts_that_they_stand_for(
    family: str, kind: source.Quantizer, more: dict[str, Any], tmp_path: Path
) -> None:
    config, stands_for = stacked(tmp_path / "model", family, kind)
    source.write_float(tmp_path / "float", config, stands_for)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", scheduler="threads", **more)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", scheduler="threads", **more)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    verify(tmp_path / "ours", tmp_path / "model").check()


def test_stacks_quantized_again_in_groups(tmp_path: Path) -> None:
    stacked(tmp_path / "model", "mixtral", TILES.quantizer)
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "scheduler": "threads"}
    convert(output_dir=tmp_path / "out", requantize=True, group_size=128, **options)
    assert quantization(tmp_path / "out")["quant_algo"] == "W4A16_GPTQ"
    verify(tmp_path / "out", tmp_path / "model").check()


def test_stacks_by_row_are_refused_with_what_would_do(tmp_path: Path) -> None:
    stacked(tmp_path / "model", "mixtral", TILES.quantizer)
    with pytest.raises(BadInput) as refused:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", use_fp8_rowwise=True)
    (problem,) = refused.value.problems
    assert "--requantize --use_weight_only --weight_only_precision int4_gptq --group_size 128" in problem.remedy


def test_a_scale_that_is_no_tile_s_is_named(tmp_path: Path) -> None:
    def wrong(module: str, weight: np.ndarray) -> source.Packed:
        packed = TILES.quantizer(module, weight)
        return replace(packed, parameters={**packed.parameters, "weight_scale_inv": np.ones((3, 2), np.float32)})

    stacked(tmp_path / "model", "mixtral", wrong)
    with pytest.raises(BadInput) as refused:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    (problem,) = refused.value.problems
    assert re.fullmatch(r"model\.layers\.0\.mlp\.experts\.(gate_up|down)_proj\.weight_scale_inv", problem.subject)
    assert problem.found == "shape [4, 3, 2], and the like in 3 more modules"
    assert ", one for each 128 x 128 of [4, " in problem.expected


def uncalibrated() -> source.Format:
    """One scale a matrix, and none of the activations."""
    static = source.compressed_float8(dynamic=False)

    def quantize(module: str, weight: np.ndarray) -> source.Packed:
        packed = static.quantizer(module, weight)
        return source.Packed({key: value for key, value in packed.parameters.items() if key != "input_scale"}, packed.weight)

    return replace(static, quantizer=quantize, algorithm="")


def test_experts_without_calibration_are_one_problem(tmp_path: Path) -> None:
    source.write(tmp_path / "model", MIXTRAL, uncalibrated())
    with pytest.raises(BadInput) as refused:
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    (problem,) = refused.value.problems
    assert problem.found == "4 experts a layer, as FP8_PER_CHANNEL_PER_TOKEN"
    again = "--requantize --use_weight_only --weight_only_precision int4_gptq --group_size 128"
    assert all(option in problem.remedy for option in ("--dequantize", again))


@pytest.mark.parametrize("flags", [{"dequantize": True}, {"dequantize": True, **AGAIN["int8"][0]}], ids=["16 bits", "int8"])
def test_experts_without_calibration_as_numbers(flags: dict[str, Any], tmp_path: Path) -> None:
    weights = source.write(tmp_path / "model", MIXTRAL, uncalibrated())
    source.write_float(tmp_path / "float", MIXTRAL, weights)
    plain = {key: value for key, value in flags.items() if key != "dequantize"}
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "ours", scheduler="threads", tp_size=2, **flags)
    convert(model_dir=tmp_path / "float", output_dir=tmp_path / "theirs", scheduler="threads", tp_size=2, **plain)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_experts_without_calibration_quantized_again(tmp_path: Path) -> None:
    source.write(tmp_path / "model", MIXTRAL, uncalibrated())
    options = {"model_dir": tmp_path / "model", "tp_size": 2, "scheduler": "threads"}
    convert(output_dir=tmp_path / "out", requantize=True, group_size=128, **options)
    assert quantization(tmp_path / "out")["quant_algo"] == "W4A16_GPTQ"
    verify(tmp_path / "out", tmp_path / "model").check()
