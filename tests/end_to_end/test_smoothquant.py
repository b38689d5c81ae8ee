"""SmoothQuant of whole models: fused sources as their parts are, and memory that stays under its limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import headrace
from stages.read.safetensors import open_file
from tests.end_to_end.test_memory import peak
from tests.support import act_ranges, checkpoints, rank_files
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, refused
from tests.support.places import DATA
from tests.support.quantized_checkpoints import LLAMA, Arrays
from tests.support.second_reading import hugging_face

KINDS = ((), ("--per_channel",), ("--per_token",), ("--per_channel", "--per_token"))
LIMIT = 220 << 20
FUSED = ("qkv_proj", "gate_up_proj", "wqkv", "wo", "w1", "w2", "w3", "o_proj", "down_proj")
OURS = {
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}


def apart(ranks: Arrays, config: dict[str, Any]) -> Arrays:
    """A Llama's tensors of the one rank of a model that is not quantized."""
    heads, of_keys = config["num_attention_heads"], config["num_key_value_heads"]
    rows = [size * config["hidden_size"] // heads for size in (heads, of_keys, of_keys)]
    found = {
        "model.embed_tokens.weight": ranks["transformer.vocab_embedding.weight"],
        "model.norm.weight": ranks["transformer.ln_f.weight"],
    }
    found["lm_head.weight"] = ranks["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
        parts = np.split(ranks[f"{ours}.attention.qkv.weight"], np.cumsum(rows)[:2])
        found |= {f"{theirs}.self_attn.{part}_proj.weight": values for part, values in zip("qkv", parts, strict=True)}
        found |= {
            f"{theirs}.{name}.weight": ranks[f"{ours}.{own}.weight"]
            for own, name in OURS.items()
            if f"{ours}.{own}.weight" in ranks
        }
        if f"{theirs}.mlp.up_proj.weight" not in found:  # up, then gate
            both = np.split(ranks[f"{ours}.mlp.fc.weight"], 2)
            found |= {f"{theirs}.mlp.{name}_proj.weight": values for name, values in zip(("up", "gate"), both, strict=True)}
    return found


def ranges(tensors: Arrays, path: Path, linears: tuple[str, ...]) -> Path:
    """Ranges that do not depend on which modules are one: of inputs alike for all of a width, of outputs the rows' magnitudes."""
    found: Arrays = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in linears:
            found[f"{module}|x"] = np.exp(np.random.default_rng(weight.shape[1]).normal(0, 1, weight.shape[1])).astype(np.float32)
            found[f"{module}|y"] = np.abs(weight.astype(np.float32)).max(axis=1)
    save_file(found, path)
    return path


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@pytest.mark.parametrize("family", ["internlm2", "phi3"])
def test_a_fused_source_is_as_its_parts(family: str, kind: tuple[str, ...], tmp_path: Path) -> None:
    fused, llama = tmp_path / "fused", tmp_path / "llama"
    shutil.copytree(DATA / "families" / "models" / family, fused)
    config = json.loads((fused / "config.json").read_text())
    (fused / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    assert convert(fused, tmp_path / "dense", "--dtype", "float16").code == 0
    parts = apart(rank_files.read(tmp_path / "dense" / "rank0.safetensors"), config)
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    checkpoints.save(
        llama, {**checkpoints.LLAMA, "attention_bias": False, "mlp_bias": False, **{key: config[key] for key in kept}}, parts
    )
    halves = {name: values.astype(np.float16) for name, values in hugging_face(fused).items()}
    files = ranges(halves, tmp_path / "fused.ranges", FUSED), ranges(parts, tmp_path / "parts.ranges", act_ranges.LINEAR)
    found: list[Arrays] = []
    for model, file in zip((fused, llama), files, strict=True):
        out = tmp_path / f"out {model.name}"
        ran = convert(model, out, "--smoothquant", 0.5, "--dtype", "float16", "--act_range", file, *kind)
        assert ran.code == 0, ran.err
        found.append(rank_files.read(out / "rank0.safetensors"))
    ours, theirs = found
    for name, values in theirs.items():
        if family == "phi3" and (".mlp.fc." in name or ".mlp.gate." in name):
            continue
        assert values.tobytes() == ours[name].tobytes(), name
    if family == "phi3" and "--per_channel" in kind:
        for layer in range(config["num_hidden_layers"]):
            base = f"transformer.layers.{layer}.mlp"
            both = [theirs[f"{base}.{name}.weight"] for name in ("gate", "fc")]
            assert np.array_equal(ours[f"{base}.fc.weight"], np.concatenate(both))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [{}, {"per_channel": True, "per_token": True}], ids=["tensor", "channel"])
def test_memory_stays_under_its_limit(kind: dict[str, bool], tmp_path: Path) -> None:
    """A layer whose two matrices of one scale are each larger than the limit."""
    tensors = checkpoints.save_wide_layer(tmp_path / "model")
    file = act_ranges.write(tmp_path / "ranges", tensors)
    del tensors
    flags = {"dtype": "float16", "smoothquant": 0.5, "act_range": str(file), **kind}
    places = {"model_dir": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}
    measured = peak(**places, tp_size=2, workers=2, memory_limit=LIMIT, **flags)
    assert measured["peak"] <= measured["projected"] <= LIMIT < measured["written"]
    assert open_file(tmp_path / "out" / "rank0.safetensors")
    shutil.rmtree(tmp_path)


def test_int8_codes_with_activations_by_token_are_kept(tmp_path: Path) -> None:
    """compressed-tensors' W8A8: its own codes and scales, and nothing smoothed."""
    source.write(tmp_path / "model", LLAMA, source.compressed_int8())
    theirs = load_file(tmp_path / "model" / "model.safetensors")
    ran = convert(tmp_path / "model", tmp_path / "out", "--quantization", "w8a8_sq", "--tp_size", 2)
    assert ran.code == 0, ran.err
    assert "nothing is smoothed" in (tmp_path / "out" / "headrace.json").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    ranks = [rank_files.read(tmp_path / "out" / f"rank{rank}.safetensors") for rank in range(2)]
    for layer in range(2):
        ours, model = f"transformer.layers.{layer}", f"model.layers.{layer}"
        for own, name, axis in (
            ("mlp.fc", "mlp.gate_proj", 0),
            ("mlp.proj", "mlp.down_proj", 1),
            ("attention.dense", "self_attn.o_proj", 1),
        ):
            codes, scales = (theirs[f"{model}.{name}.{key}"] for key in ("weight", "weight_scale"))
            assert np.array_equal(np.concatenate([rank[f"{ours}.{own}.weight"] for rank in ranks], axis=axis), codes)
            held = [rank[f"{ours}.{own}.per_channel_scale"] for rank in ranks]
            wanted = scales.astype(np.float32).reshape(1, -1)
            assert np.array_equal(np.concatenate(held, axis=1) if axis == 0 else held[0], wanted)
            assert held[0].dtype == np.float32
        queries = theirs[f"{model}.self_attn.q_proj.weight"]
        assert np.array_equal(ranks[1][f"{ours}.attention.qkv.weight"][: len(queries) // 2], queries[len(queries) // 2 :])
        for rank in ranks:
            assert np.array_equal(rank[f"{ours}.mlp.proj.smoother"], np.ones((1, LLAMA["intermediate_size"] // 2), np.float32))
            assert np.array_equal(rank[f"{ours}.input_layernorm.scale_to_int"], np.ones(1, np.float32))
            norm = theirs[f"{model}.input_layernorm.weight"]
            assert np.array_equal(rank[f"{ours}.input_layernorm.weight"].astype(np.float32), norm.astype(np.float32))


OTHERS = {
    "static": (source.compressed_int8(static=True), "w8a8_sq"),
    "by tensor": (source.compressed_int8(), "w8a8_sq_per_tensor"),
    "weights alone": (source.eetq(), "w8a8_sq"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_codes_that_are_meant_otherwise_are_refused(other: str, tmp_path: Path) -> None:
    kind, name = OTHERS[other]
    source.write(tmp_path / "model", LLAMA, kind)
    problems = refused(tmp_path / "model", "--quantization", name)
    assert any("which is W8A16" in problem for problem in problems), problems


def small(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and its ranges."""
    tensors = source.values(LLAMA)
    checkpoints.save(tmp_path / "model", LLAMA, tensors)
    return tmp_path / "model", act_ranges.write(tmp_path / "ranges", tensors)


def test_several_targets_of_one_read(tmp_path: Path) -> None:
    """Beside a dense target and one of int8, and with pipeline stages: the bytes of each alone."""
    model, ranges = small(tmp_path)
    asked: dict[str, dict[str, Any]] = {
        "dense": {},
        "int8": {"quantization": "int8", "int8_kv_cache": True},
        "tensor": {"quantization": "w8a8_sq_per_tensor", "tp_size": 4},
        "token": {"quantization": "w8a8_sq", "pp_size": 2, "smoothquant": 0.8},
    }
    common = {"model_dir": model, "dtype": "float16", "scheduler": "threads"}
    headrace.convert(
        **common, act_range=ranges, target=[{"output_dir": tmp_path / "all" / name, **own} for name, own in asked.items()]
    )
    for name, own in asked.items():
        more = {} if name == "dense" else {"act_range": ranges}
        headrace.convert(**common, **more, **own, output_dir=tmp_path / name)
        for path in sorted((tmp_path / name).glob("*.safetensors")):
            assert path.read_bytes() == (tmp_path / "all" / name / path.name).read_bytes(), (name, path.name)
        assert headrace.verify(tmp_path / name, model).ok


def test_a_loader_gives_what_is_written(tmp_path: Path) -> None:
    model, ranges = small(tmp_path)
    options: dict[str, Any] = {"dtype": "float16", "tp_size": 2, "quantization": "w8a8_sq_per_channel", "act_range": ranges}
    headrace.convert(model_dir=model, output_dir=tmp_path / "out", scheduler="threads", **options)
    for rank in range(2):
        written = rank_files.read(tmp_path / "out" / f"rank{rank}.safetensors")
        weights = headrace.load_from_hf_checkpoint(model, tp_rank=rank, **options)
        assert set(weights) == written.keys()
        assert all(np.array_equal(weights[name].numpy(), values) for name, values in written.items())
