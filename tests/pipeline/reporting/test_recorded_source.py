"""`headrace report` without --source: outputs of more files than the model's own are compared with it, where it is unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import convert
from tests.pipeline.reporting.test_report import Page
from tests.support import act_ranges, checkpoints, meta_files
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace

CONFIG = {**source.LLAMA, "hidden_size": 128, "intermediate_size": 256}
SMOOTH: dict[str, Any] = {"smoothquant": 0.5, "dtype": "float16"}
COMPARED, NOT_COMPARED = "compared with the source;", "as no source was there"


def model(tmp_path: Path) -> dict[str, Any]:
    checkpoints.save(tmp_path / "model", CONFIG, source.values(CONFIG))
    return {"model_dir": tmp_path / "model"}


def ranges(tmp_path: Path) -> dict[str, Any]:
    return {**model(tmp_path), **SMOOTH, "act_range": act_ranges.write(tmp_path / "elsewhere/ranges", source.values(CONFIG))}


def named_like_the_weights(tmp_path: Path) -> dict[str, Any]:
    path = act_ranges.write(tmp_path / "elsewhere/model.safetensors", source.values(CONFIG))
    return {**model(tmp_path), **SMOOTH, "act_range": path}


def tokens(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "elsewhere/tokens"
    save_file({"input_ids": np.random.default_rng(0).integers(0, 96, (2, 8))}, path)
    return {**model(tmp_path), **SMOOTH, "calibration_tokens": path}


def quantized(tmp_path: Path) -> dict[str, Any]:
    source.write(tmp_path / "elsewhere/quantized", CONFIG, source.gptq())
    return {**model(tmp_path), "quant_ckpt_path": tmp_path / "elsewhere/quantized"}


def quantized_file(tmp_path: Path) -> dict[str, Any]:
    options = quantized(tmp_path)
    return {**options, "quant_ckpt_path": options["quant_ckpt_path"] / "model.safetensors"}


def parts(tmp_path: Path) -> dict[str, Any]:
    meta_files.write(tmp_path / "model", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), 2, files=2)
    return {"meta_ckpt_dir": tmp_path / "model"}


MADE = {
    "ranges": ranges,
    "of a shard's name": named_like_the_weights,
    "tokens": tokens,
    "quantized": quantized,
    "a quantized file": quantized_file,
    "parts that are directories": parts,
}


def reported(tmp_path: Path) -> str:
    ran = headrace("report", tmp_path / "out")
    assert ran.code == 0, ran
    return Page((tmp_path / "out.report.html").read_text()).text


@pytest.mark.parametrize("what", MADE)
def test_it_is_compared_with_what_it_was_made_of(what: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    convert(**MADE[what](tmp_path), output_dir=tmp_path / "out", scheduler="threads")
    assert COMPARED in reported(tmp_path)
    config = tmp_path / "model" / ("params.json" if "parts" in what else "config.json")
    config.write_text(config.read_text() + " ")
    assert NOT_COMPARED in reported(tmp_path)


@pytest.mark.parametrize("name", ["ranges", "tokens"])
def test_what_activations_were_measured_on_need_not_be_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    convert(**MADE[name](tmp_path), output_dir=tmp_path / "out", scheduler="threads")
    (tmp_path / "elsewhere" / name).unlink()
    assert COMPARED in reported(tmp_path)


def test_a_quantized_checkpoint_that_changed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    convert(**quantized(tmp_path), output_dir=tmp_path / "out", scheduler="threads")
    config = tmp_path / "elsewhere/quantized/config.json"
    config.write_text(config.read_text() + " ")
    assert NOT_COMPARED in reported(tmp_path)


def test_each_file_is_recorded_by_its_place_in_what_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    options = quantized(tmp_path) | {"dequantize": True, **SMOOTH}
    options["act_range"] = act_ranges.write(tmp_path / "model/ranges", source.values(CONFIG))
    convert(**options, output_dir=tmp_path / "out", scheduler="threads")
    recorded = json.loads((tmp_path / "out/headrace.json").read_text())["source"]
    assert recorded["quant_ckpt_path"] == str(tmp_path / "elsewhere/quantized")
    assert sorted((file["path"], file.get("of", "")) for file in recorded["files"]) == [
        ("config.json", ""),
        ("config.json", "quant_ckpt_path"),
        ("model.safetensors", ""),
        ("model.safetensors", "quant_ckpt_path"),
        ("ranges", "act_range"),
    ]
