"""FP8 with one scale a matrix, and an FP8 cache, of numbers and measured ranges: against the formulas written anew."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support import act_ranges, checkpoints, rank_files
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, headrace, one, refused
from tests.support.places import DATA
from tests.support.quantized_checkpoints import LLAMA, Arrays

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def made(tmp_path: Path) -> tuple[Path, Path, Arrays]:
    """A model, its ranges, and its tensors in bfloat16 as float32."""
    tensors = {name: values.astype(ml_dtypes.bfloat16) for name, values in source.values(LLAMA).items()}
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    ranges = act_ranges.write(tmp_path / "ranges", tensors)
    return tmp_path / "model", ranges, {name: values.astype(np.float32) for name, values in tensors.items()}


@pytest.mark.parametrize("tp", [1, 2])
def test_codes_and_scales(tp: int, tmp_path: Path) -> None:
    model, ranges, tensors = made(tmp_path)
    ran = convert(
        model, tmp_path / "out", "--use_fp8", "--fp8_kv_cache", "--act_range", ranges, "--dtype", "bfloat16", "--tp_size", tp
    )
    assert ran.code == 0, ran.err
    measured, ranks = load_file(ranges), [rank_files.read(tmp_path / "out" / f"rank{n}.safetensors") for n in range(tp)]
    for layer in range(2):
        ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
        names = {"attention.qkv": [f"self_attn.{part}_proj" for part in "qkv"], "attention.dense": ["self_attn.o_proj"]}
        names |= {"mlp.fc": ["mlp.gate_proj"], "mlp.gate": ["mlp.up_proj"], "mlp.proj": ["mlp.down_proj"]}
        for own, parts in names.items():
            weights = [tensors[f"{theirs}.{part}.weight"] for part in parts]
            scale = np.float32(max(np.abs(weight).max() for weight in weights)) / np.float32(448)
            inputs = np.float32(max(measured[f"{theirs}.{part}|x"].max() for part in parts)) / np.float32(448)
            axis = 1 if own in ("attention.dense", "mlp.proj") else 0
            for number, rank in enumerate(ranks):
                codes = [np.split((weight / scale).astype(FLOAT8), tp, axis)[number] for weight in weights]
                assert rank[f"{ours}.{own}.weight"].tobytes() == np.concatenate(codes).tobytes(), own
                assert rank[f"{ours}.{own}.weights_scaling_factor"] == scale
                assert rank[f"{ours}.{own}.activation_scaling_factor"] == inputs
        cache = np.float32(max(measured[f"{theirs}.self_attn.{part}_proj|y"].max() for part in "kv")) / np.float32(448)
        assert all(rank[f"{ours}.attention.kv_cache_scaling_factor"] == cache for rank in ranks)
    ran = headrace("verify", tmp_path / "out", "--source", model)
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["quant_algo"] == "FP8"


def test_a_cache_alone_and_without_ranges(tmp_path: Path) -> None:
    model, ranges, _ = made(tmp_path)
    assert convert(model, tmp_path / "measured", "--fp8_kv_cache", "--act_range", ranges).code == 0
    assert convert(model, tmp_path / "one", "--fp8_kv_cache").code == 0
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    assert rank_files.read(tmp_path / "one" / "rank0.safetensors")[name] == 1
    assert rank_files.read(tmp_path / "measured" / "rank0.safetensors")[name] != 1
    for output in ("one", "measured"):
        assert headrace("verify", tmp_path / output, "--source", model).code == 0


def test_a_source_s_own_scale_of_its_cache_counts_first(tmp_path: Path) -> None:
    source.write(tmp_path / "model", LLAMA, source.modelopt_float8(cache=True))
    ranges = act_ranges.write(tmp_path / "ranges", source.values(LLAMA))
    for output, more in (("own", ()), ("both", ("--act_range", ranges))):
        assert convert(tmp_path / "model", tmp_path / output, "--fp8_kv_cache", *more).code == 0
    own, both = (rank_files.read(tmp_path / output / "rank0.safetensors") for output in ("own", "both"))
    assert all(own[name].tobytes() == both[name].tobytes() for name in own)


def test_ranges_are_not_those_of_normed_keys(tmp_path: Path) -> None:
    """Qwen3 caches what a norm makes of k_proj's outputs: its cache has a scale of 1, and the plan says so."""
    model = DATA / "families/models/qwen3_untied"
    save_file({"input_ids": np.random.default_rng(0).integers(0, 96, (2, 12))}, tmp_path / "tokens")
    words = ("--calibration_tokens", tmp_path / "tokens", "--calibration_dtype", "float32")
    assert convert(model, tmp_path / "out", "--use_fp8", "--fp8_kv_cache", *words).code == 0
    held = rank_files.read(tmp_path / "out" / "rank0.safetensors")
    scales = {name: values.tolist() for name, values in held.items() if name.endswith("kv_cache_scaling_factor")}
    assert scales
    assert set(map(tuple, scales.values())) == {(1.0,)}
    notes = json.loads((tmp_path / "out" / "headrace.json").read_text())["notes"]
    assert any("scales of 1: keys are normed behind k_proj" in note for note in notes)


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    model, ranges, tensors = made(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 3] = np.nan
    checkpoints.save(model, LLAMA, {key: values.astype(ml_dtypes.bfloat16) for key, values in tensors.items()})
    ran = convert(model, tmp_path / "out", "--use_fp8", "--act_range", ranges)
    assert ran.code == 2
    assert name in ran.err
    assert not (tmp_path / "out").exists()
    assert "no --act_range" in one(refused(model, "--use_fp8", output=tmp_path / "x"))
