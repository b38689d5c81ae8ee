"""Ranges of activations that are missing, wrong, or of no use; models and options that SmoothQuant or an INT8 cache is not for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import act_ranges, checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import convert, one, refused
from tests.support.places import DATA
from tests.support.quantized_checkpoints import Arrays

LLAMA = {**source.LLAMA, "hidden_size": 128, "intermediate_size": 256}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SMOOTH = ("--smoothquant", 0.5, "--dtype", "float16")


def model_of(tmp_path: Path, config: dict[str, Any] = LLAMA) -> Path:
    checkpoints.save(tmp_path / "model", config, source.values(config))
    return tmp_path / "model"


def ranges_of(tmp_path: Path, edit: Callable[[Arrays], Any] = lambda _: None, config: dict[str, Any] = LLAMA) -> Path:
    found = act_ranges.ranges(source.values(config))
    edit(found)
    save_file(found, tmp_path / "ranges.safetensors")
    return tmp_path / "ranges.safetensors"


def changed(name: str, value: Any) -> Callable[[Arrays], Any]:
    def edit(found: Arrays) -> None:
        found[name] = np.asarray(value) if not callable(value) else value(found[name])

    return edit


WRONG = {
    "missing": (lambda found: found.pop(f"{DOWN}|x"), f"{DOWN}|x: found no such tensor; expected float32 [256]"),
    "shape": (changed(f"{Q}|x", np.ones(64, np.float32)), f"{Q}|x: found float32 [64]; expected float32 [128] by the model"),
    "type": (changed(f"{Q}|y", lambda old: old.astype(np.float16)), f"{Q}|y: found float16 [256]; expected float32 [256]"),
    "nan": (changed(f"{Q}|x", lambda old: old * np.nan), f"{Q}|x: found a value that is not finite"),
    "infinity": (changed(f"{Q}|y", lambda old: old * np.inf), f"{Q}|y: found a value that is not finite"),
    "sign": (changed(f"{Q}|y", lambda old: -old), f"{Q}|y: found a value below 0"),
    "zeros": (changed(f"{DOWN}|y", lambda old: old * 0), f"{DOWN}|y: found nothing but zeros"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_ranges_that_are_none(wrong: str, tmp_path: Path) -> None:
    edit, said = WRONG[wrong]
    assert said in one(refused(model_of(tmp_path), *SMOOTH, "--act_range", ranges_of(tmp_path, edit)))


def test_many_of_one_cause_are_one_problem(tmp_path: Path) -> None:
    found = one(refused(model_of(tmp_path), *SMOOTH, "--act_range", ranges_of(tmp_path, dropping("|x"))))
    assert "no such tensor, and the like in 13 more tensors" in found
    assert "headrace calibrate" in found


def dropping(end: str) -> Callable[[Arrays], None]:
    def edit(found: Arrays) -> None:
        for name in [name for name in found if name.endswith(end)]:
            del found[name]

    return edit


def test_an_int8_cache_needs_what_queries_keys_and_values_give_alone(tmp_path: Path) -> None:
    def edit(found: Arrays) -> None:
        for name in [name for name in found if not name.endswith(tuple(f"{part}_proj|y" for part in "qkv"))]:
            del found[name]

    model, ranges = model_of(tmp_path), ranges_of(tmp_path, edit)
    assert convert(model, tmp_path / "out", "--int8_kv_cache", "--act_range", ranges).code == 0
    less = ranges_of(tmp_path, lambda found: found.pop("model.layers.1.self_attn.v_proj|y"))
    found = one(refused(model, "--int8_kv_cache", "--act_range", less, output=tmp_path / "x"))
    assert "model.layers.1.self_attn.v_proj|y: found no such tensor" in found


@pytest.mark.parametrize("flags", [SMOOTH, ("--int8_kv_cache",)], ids=["smoothquant", "cache"])
def test_without_a_file(flags: tuple[Any, ...], tmp_path: Path) -> None:
    found = one(refused(model_of(tmp_path), *flags))
    assert found.startswith(f"{flags[0]}: found no --act_range")
    assert "headrace calibrate" in found


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 no safetensors", {"weight": np.ones(1, np.float32)}, {}], ids=str)
def test_a_file_of_something_else(content: Any, tmp_path: Path) -> None:
    model, path = model_of(tmp_path), tmp_path / "ranges.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    assert "ranges.safetensors" in one(refused(model, *SMOOTH, "--act_range", path))


def test_a_file_that_nothing_uses(tmp_path: Path) -> None:
    found = one(refused(model_of(tmp_path), "--use_weight_only", "--act_range", ranges_of(tmp_path)))
    assert "found a target that uses no ranges" in found


def test_experts_in_fp8_need_ranges_of_their_own(tmp_path: Path) -> None:
    def edit(found: Arrays) -> None:
        for name in [name for name in found if ".experts.2." in name]:
            del found[name]

    model = model_of(tmp_path, source.MIXTRAL)
    found = one(refused(model, "--use_fp8", "--act_range", ranges_of(tmp_path, edit, source.MIXTRAL)))
    assert "block_sparse_moe.experts.2.w1|x: found no such tensor, and the like in 5 more tensors; expected float32 [256]" in found


CONTRADICTING = {
    ("--per_channel",): "--per_channel: found no --smoothquant",
    ("--per_channel", "--per_token"): "--per_channel --per_token: found no --smoothquant",
    ("--int8_kv_cache", "--fp8_kv_cache"): "--int8_kv_cache: found --fp8_kv_cache too",
    ("--int8_kv_cache", "--use_fp8_rowwise"): "--int8_kv_cache: found with FP8_PER_CHANNEL_PER_TOKEN",
    ("--smoothquant", "0.5", "--dtype", "bfloat16"): "--dtype bfloat16: found bfloat16 with W8A8_SQ_PER_TENSOR_PLUGIN",
    ("--smoothquant", "1.5"): "--smoothquant: found '1.5'",
    ("--smoothquant", "0"): "--smoothquant: found '0'",
    (
        "--smoothquant",
        "0.5",
        "--use_weight_only",
        "--dtype",
        "float16",
    ): "--weight_only_precision int8 --smoothquant 0.5: found W8A16 and",
}


@pytest.mark.parametrize("flags", CONTRADICTING, ids=" ".join)
def test_options_that_contradict_each_other(flags: tuple[str, ...], tmp_path: Path) -> None:
    needed = ("--act_range", ranges_of(tmp_path)) if {"--int8_kv_cache", "--smoothquant"} & set(flags) else ()
    problems = refused(model_of(tmp_path), *flags, *needed)
    assert any(problem.startswith(CONTRADICTING[flags]) for problem in problems), problems


LACKING = {
    "qwen3_untied": "q and k norms",
    "gemma2": "capped scores",
    "gemma3": "local rope",
    "qwen2_moe": "experts",
    "phi3_longrope": "long rope",
}


@pytest.mark.parametrize("model", LACKING)
def test_what_its_class_does_not_compute_is_refused_with_what_would_do(model: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / "families" / "models" / model, tmp_path / "model")
    problems = refused(tmp_path / "model", *SMOOTH)
    found = one([problem for problem in problems if problem.startswith("quantization: found W8A8_SQ_PER_TENSOR_PLUGIN")])
    assert LACKING[model] in found
    assert "SmoothQuantAttention computes none of these" in found
    assert "Give --quantization int8; or fp8_rowwise" in found


@pytest.mark.parametrize("family", ["qwen3_untied", "gemma3"])
def test_an_int8_cache_of_normed_keys(family: str, tmp_path: Path) -> None:
    """Ranges are of k_proj's outputs, and the cache holds what a norm makes of them."""
    found = one(refused(DATA / "families/models" / family, "--int8_kv_cache", output=tmp_path / "out"))
    assert found.startswith("--int8_kv_cache: found ")
    assert "normed behind k_proj" in found
    assert "--fp8_kv_cache, which needs no ranges" in found


@pytest.mark.parametrize("flag", ["--act_range", "--calibration_tokens"])
def test_ranges_for_an_fp8_cache_of_normed_keys_alone(flag: str, tmp_path: Path) -> None:
    """Nothing would be made of them: no model is run for that."""
    model = Path(shutil.copytree(DATA / "families/models/qwen3_untied", tmp_path / "model"))
    path = tmp_path / "file"
    save_file({"input_ids": np.arange(8)[None]} if "tokens" in flag else act_ranges.ranges(source.values(LLAMA)), path)
    found = one(refused(model, "--fp8_kv_cache", flag, path))
    assert found.startswith(f"{flag} {path}: found an FP8 cache of Qwen3ForCausalLM, whose cached keys are normed behind k_proj")
    assert found.endswith("Leave it out: the cache has the source's scales, or 1")
    assert convert(model, tmp_path / "out", "--fp8_kv_cache").code == 0
