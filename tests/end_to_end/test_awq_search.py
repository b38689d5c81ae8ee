"""INT4-AWQ from 16-bit numbers: calibrated, converted, verified; nearer to the model than round-to-nearest, by layer and logit."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import headrace
from stages.verify.values import signed_pairs
from tests.end_to_end.test_memory import peak
from tests.support import act_ranges, checkpoints, rank_files
from tests.support import quantized_checkpoints as source
from tests.support.calibrations import random_tokens
from tests.support.commands import convert
from tests.support.commands import headrace as run
from tests.support.places import DATA
from tests.support.quantized_checkpoints import LLAMA, Arrays

AWQ = ("--quantization", "int4_awq", "--group_size", 64)
LIMIT = 220 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, some of whose channels are large, its tokens, and the scales that were searched."""
    folder = tmp_path_factory.mktemp("awq")
    tensors = source.values(LLAMA)
    wide = np.exp(np.random.default_rng(1).normal(0, 1, LLAMA["hidden_size"]))
    for layer in range(LLAMA["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = wide.astype(np.float16)
    checkpoints.save(folder / "model", LLAMA, tensors)
    random_tokens(folder / "tokens", 64, (4, 24))
    words = ("--calibration_tokens", folder / "tokens", "--awq_group_size", 64, "--dtype", "float32")
    ran = run("calibrate", folder / "model", "--output", folder / "scales", *words)
    assert ran.code == 0, ran
    return folder


def test_every_layer_is_nearer_than_round_to_nearest(made: Path) -> None:
    found = load_file(made / "scales")
    pairs = {name: values for name, values in found.items() if name.endswith("|awq_error")}
    assert len(pairs) == 7 * LLAMA["num_hidden_layers"]
    assert all(0 < after < before for before, after in pairs.values())
    by_norm = [after / before for name, (before, after) in pairs.items() if "o_proj" not in name and "down" not in name]
    assert max(by_norm) < 0.8


def figures(folder: Path, output: Path) -> dict[str, Any]:
    ran = run("verify", output, "--source", folder / "model", "--logits", "--json")
    assert ran.code == 0, ran
    return {each["against"]: each for each in json.loads(ran.out)["logits"]["comparisons"]}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_logits_are_nearer_too_and_verified(dtype: str, made: Path, tmp_path: Path) -> None:
    with_scales = load_file(made / "scales")
    ones = {name: np.ones_like(values) if name.endswith("|awq") else values for name, values in with_scales.items()}
    save_file(ones, tmp_path / "ones", metadata={"awq_group_size": "64"})
    divergence = {}
    for name, file in (("searched", made / "scales"), ("nearest", tmp_path / "ones")):
        ran = convert(made / "model", tmp_path / name, *AWQ, "--act_range", file, "--dtype", dtype, "--tp_size", 2)
        assert ran.code == 0, ran
        against = figures(made, tmp_path / name)
        assert against["joined ranks"]["max_relative"] < 1e-4
        divergence[name] = against["source"]["kl_mean"]
    assert divergence["searched"] < divergence["nearest"], divergence


@cache
def joined(directory: Path, ranks: int) -> Arrays:
    """The numbers that the tensors of the first layer stand for, put together from all ranks by hand."""
    parts = [rank_files.read(directory / f"rank{rank}.safetensors") for rank in range(ranks)]
    result: Arrays = {}
    for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        name, pieces = f"transformer.layers.0.{module}", []
        for held in parts:
            codes = signed_pairs(held[f"{name}.weight"].view(np.uint8)).astype(np.float32)
            steps = np.repeat(held[f"{name}.weights_scaling_factor"], 64, axis=1)
            pieces.append(codes * steps * held[f"{name}.prequant_scaling_factor"].astype(np.float32))
        result[module] = np.concatenate(pieces, axis=1 if module in ("attention.dense", "mlp.proj") else 0)
    return result


def test_ranks_are_cuts_of_one_quantization(made: Path, tmp_path: Path) -> None:
    """Groups are of in-features, so that a split into ranks changes no code."""
    for tp_size in (1, 2, 4):
        ran = convert(made / "model", tmp_path / str(tp_size), *AWQ, "--act_range", made / "scales", "--tp_size", tp_size)
        assert ran.code == 0, ran
    one = joined(tmp_path / "1", 1)
    two = joined(tmp_path / "2", 2)
    for module in ("attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        assert np.array_equal(one[module], two[module]), module
        assert np.array_equal(one[module], joined(tmp_path / "4", 4)[module]), module
    queries, keys = LLAMA["num_attention_heads"] * 64, LLAMA["num_key_value_heads"] * 64
    parts = np.split(one["attention.qkv"], [queries, queries + keys])
    halves = [np.split(part, 2)[rank] for rank in range(2) for part in parts]
    assert np.array_equal(np.concatenate(halves), two["attention.qkv"])
    quantization = json.loads((tmp_path / "2" / "config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "W4A16_AWQ"
    assert (quantization["group_size"], quantization["has_zero_point"], quantization["pre_quant_scale"]) == (64, False, True)


def test_a_conversion_that_calibrates_itself_writes_the_same(made: Path, tmp_path: Path) -> None:
    same = (*AWQ, "--tp_size", 2)
    assert convert(made / "model", tmp_path / "file", *same, "--act_range", made / "scales").code == 0
    itself = ("--calibration_tokens", made / "tokens", "--calibration_dtype", "float32")
    ran = convert(made / "model", tmp_path / "itself", *same, *itself)
    assert ran.code == 0, ran
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        assert (tmp_path / "itself" / rank).read_bytes() == (tmp_path / "file" / rank).read_bytes()


FAMILIES = ["gemma", "phi3", "qwen2_untied"]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    """Fused sources, biases, norms that count from 1."""
    config = json.loads((DATA / "families" / "models" / family / "config.json").read_text())
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    model = tmp_path / "model"
    _tiny({**config, **sizes, "rope_scaling": None, "num_hidden_layers": 1}, model)
    words = ("--calibration_tokens", random_tokens(tmp_path / "tokens", 64, (4, 24)), "--calibration_dtype", "float32")
    ran = convert(model, tmp_path / "out", *AWQ, *words, "--tp_size", 2, "--dtype", "float16")
    assert ran.code == 0, ran
    ran = run("verify", tmp_path / "out", "--source", model, "--logits", "--json")
    assert ran.code == 0, ran


def _tiny(config: dict[str, Any], directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = AutoConfig.for_model(**{key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")})
    AutoModelForCausalLM.from_config(kind).half().save_pretrained(directory)


@pytest.mark.parametrize("damage", ["code", "scale", "factor"])
def test_damage_is_found(damage: str, made: Path, tmp_path: Path) -> None:
    """Values alone: as if another tool had written them, without checksums."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert convert(made / "model", tmp_path / "out", *AWQ, "--act_range", made / "scales").code == 0
    path = tmp_path / "out" / "rank0.safetensors"
    tensors, name = load_file(path), "transformer.layers.1.mlp.proj"
    if damage == "code":
        tensors[f"{name}.weight"][3, 70] ^= 0x04
    elif damage == "scale":
        tensors[f"{name}.weights_scaling_factor"][5, 1] *= np.float32(1.5)
    else:
        tensors[f"{name}.prequant_scaling_factor"][9] *= np.float16(1.25)
    save_file(tensors, path)
    (tmp_path / "out" / "headrace.json").unlink()
    ran = run("verify", tmp_path / "out", "--source", made / "model")
    assert ran.code == 5, ran
    assert name in ran.err + ran.out


@pytest.mark.nightly
def test_memory_of_a_conversion_stays_under_its_limit(tmp_path: Path) -> None:
    tensors = checkpoints.save_wide_layer(tmp_path / "model")
    file = act_ranges.write_scales(tmp_path / "scales", tensors, 128)
    del tensors
    places = {"model_dir": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "act_range": str(file)}
    measured = peak(**places, tp_size=2, workers=2, memory_limit=LIMIT, quantization="int4_awq", dtype="float16")
    assert measured["peak"] <= measured["projected"] <= LIMIT < measured["written"]
    shutil.rmtree(tmp_path)


def test_a_loader_gives_what_is_written(made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantization": "int4_awq", "group_size": 64, "act_range": made / "scales", "tp_size": 2}
    headrace.convert(model_dir=made / "model", output_dir=tmp_path / "out", scheduler="threads", **options)
    written = rank_files.read(tmp_path / "out" / "rank1.safetensors")
    weights = headrace.load_from_hf_checkpoint(made / "model", tp_rank=1, **options)
    assert set(weights) == written.keys()
    assert all(np.array_equal(weights[name].numpy(), values) for name, values in written.items())
