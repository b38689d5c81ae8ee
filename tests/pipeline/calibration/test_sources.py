"""Ranges of sources of every kind: those of the Hugging Face model that they are, measured before or in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import convert
from tests.support import checkpoints, gguf_families, gguf_files, meta_files, rank_files
from tests.support.commands import headrace
from tests.support.directories import contents
from tests.support.places import DATA
from tests.support.quantized_checkpoints import LLAMA, values

OPTIONS: dict[str, Any] = {"smoothquant": 0.5, "per_channel": True, "per_token": True, "dtype": "float16", "scheduler": "threads"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a Hugging Face model in float16, as `huggingface`, and tokens."""
    tensors = {name: array.astype(np.float16) for name, array in values(LLAMA).items()}
    checkpoints.save(tmp_path / "huggingface", LLAMA, tensors)
    meta_files.write(tmp_path / "meta", LLAMA, tensors)
    gguf_files.write(tmp_path / "model.gguf", LLAMA, tensors, kind="F16")
    bins = tmp_path / "bin"
    bins.mkdir()
    (bins / "config.json").write_bytes((tmp_path / "huggingface" / "config.json").read_bytes())
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, bins / "pytorch_model.bin")
    save_file({"input_ids": np.random.default_rng(0).integers(0, 96, (2, 12))}, tmp_path / "tokens")
    return tmp_path


def ranks(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(output).items() if name.startswith("rank")}


SOURCES = {
    "gguf": {"model_dir": "model.gguf"},
    "meta": {"meta_ckpt_dir": "meta"},
    "bin": {"model_dir": "bin"},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_other_containers_in_the_same_run(kind: str, place: Path) -> None:
    tokens = {"calibration_tokens": place / "tokens", "calibration_dtype": "float16"}
    convert(model_dir=place / "huggingface", output_dir=place / "expected", **tokens, **OPTIONS)
    source: dict[str, Any] = {name: place / value for name, value in SOURCES[kind].items()}
    convert(**source, output_dir=place / "out", **tokens, **OPTIONS)
    assert ranks(place / "out") == ranks(place / "expected")


def test_a_model_in_memory(place: Path) -> None:
    tokens = {"calibration_tokens": place / "tokens"}
    convert(model_dir=place / "huggingface", output_dir=place / "expected", **tokens, **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(place / "huggingface", dtype=torch.float16)
    convert(model=model, output_dir=place / "out", **tokens, **OPTIONS)
    assert ranks(place / "out") == ranks(place / "expected")


@pytest.mark.parametrize("kind", ["huggingface", "model.gguf", "meta"])
def test_a_file_of_ranges_is_for_all_of_them(kind: str, place: Path) -> None:
    words = ("--output", place / "ranges", "--calibration_tokens", place / "tokens", "--dtype", "float16")
    ran = headrace("calibrate", place / kind, *words)
    assert ran.code == 0, ran
    for name, source in {"huggingface": {"model_dir": "huggingface"}, **SOURCES}.items():
        where: dict[str, Any] = {key: place / value for key, value in source.items()}
        convert(**where, output_dir=place / f"out-{name}", act_range=place / "ranges", **OPTIONS)
    assert len({str(sorted(ranks(place / f"out-{name}").items())) for name in ("huggingface", *SOURCES)}) == 1


GGUF = {
    "qwen2": "qwen2_untied",
    "qwen3": "qwen3_untied",
    "phi3": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}


@pytest.mark.parametrize("family", GGUF)
def test_gguf_of_other_families(family: str, tmp_path: Path) -> None:
    """FP8, whose scales are of every linear: those of the file that the Hugging Face directory gives."""
    model = DATA / "families" / "models" / GGUF[family]
    gguf_families.save_twin(tmp_path / "twin", model, gguf_families.write(tmp_path / "model.gguf", model))
    save_file({"input_ids": np.random.default_rng(0).integers(0, 96, (2, 12))}, tmp_path / "tokens")
    options: dict[str, Any] = {"use_fp8": True, "fp8_kv_cache": True, "dtype": "bfloat16", "scheduler": "threads"}
    options |= {"calibration_tokens": tmp_path / "tokens", "calibration_dtype": "float32"}
    scalar = json.loads((model / "config.json").read_text()).get("query_pre_attn_scalar")
    for name, told in (("model.gguf", {"query_pre_attn_scalar": scalar}), ("twin", {})):
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"{name}.out", **options, **told)
    found, expected = (rank_files.read(tmp_path / f"{name}.out" / "rank0.safetensors") for name in ("model.gguf", "twin"))
    scales = [name for name in expected if name.endswith("scaling_factor")]
    assert scales
    assert all(found[name] == pytest.approx(expected[name], rel=1e-5) for name in scales)


# Whose files have other names than transformers' modules, or rows of several in one.
FAMILIES = ["internlm2", "exaone", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_names_of_their_own(family: str, tmp_path: Path) -> None:
    model = DATA / "families" / "models" / family
    save_file({"input_ids": np.random.default_rng(0).integers(0, 96, (2, 12))}, tmp_path / "tokens")
    options = {"model_dir": model, "int8_kv_cache": True, "rope_scaling": "none", "scheduler": "threads"}
    convert(**options, output_dir=tmp_path / "out", calibration_tokens=tmp_path / "tokens", calibration_dtype="float32")
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", tmp_path / "tokens", "--dtype", "float32")
    assert headrace("calibrate", model, *words).code == 0
    measured = load_file(tmp_path / "ranges")
    for layer in range(2):
        front = f"model.layers.{layer}.self_attn"
        parts = [measured.get(f"{front}.{part}_proj|y") for part in ("q", "k", "v", "qkv")]
        largest = max(each.max() for each in parts if each is not None)
        found = load_file(tmp_path / "out" / "rank0.safetensors")[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
        assert found == pytest.approx(largest / 127, rel=1e-6)
