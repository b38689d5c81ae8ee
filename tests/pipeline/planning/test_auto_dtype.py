"""`--dtype auto` of a model whose config.json names no type: its tensors' own, and the plan says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import plan
from tests.support import checkpoints, gguf_files, quantized_checkpoints
from tests.support.commands import convert, headrace
from tests.support.directories import contents

LLAMA = checkpoints.LLAMA
FORMATS = quantized_checkpoints.formats()
TYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}


def saved(folder: Path, types: dict[str, str], named: str | None = None) -> Path:
    """A model whose tensors have the type of the first key that is in their name; `named`: what config.json says."""
    random = np.random.default_rng(1)
    tensors = {
        name: random.standard_normal(shape).astype(TYPES[next(kind for key, kind in types.items() if key in name)])
        for name, shape in checkpoints.shapes(LLAMA).items()
    }
    checkpoints.save(folder, without_dtype(LLAMA) | ({"torch_dtype": named} if named else {}), tensors)
    return folder


def notes(made: Any) -> list[str]:
    return [note for note in made.notes if note.startswith("dtype ")]


@pytest.mark.parametrize(
    ("types", "expected", "told"),
    [
        ({"": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"": "float16"}, "float16", "float16"),
        ({"": "float32"}, "float16", "float32"),
        ({"norm": "float32", "": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"norm": "bfloat16", "": "float32"}, "float16", "float32"),
        ({"embed": "float16", "": "bfloat16"}, "bfloat16", "bfloat16"),
    ],
    ids=lambda value: str(value),
)
def test_the_type_of_most_weights(types: dict[str, str], expected: str, told: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", types)
    made = plan(model_dir=model, output_dir=tmp_path / "out")
    assert made.targets[0].dtype == json.loads(made.targets[0].output.config)["dtype"] == expected
    assert notes(made) == [f"dtype {expected}: config.json names none, and its weights are {told}; --dtype says another"]
    assert notes(made)[0] in " ".join(headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out").out.split())
    # The bytes are those of the same model whose config.json names the type.
    assert convert(model, tmp_path / "out").code == 0
    assert convert(saved(tmp_path / "named", types, told), tmp_path / "same").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "same")


def test_nothing_is_said_where_a_type_is_named_or_chosen(tmp_path: Path) -> None:
    unnamed, named = saved(tmp_path / "a", {"": "bfloat16"}), saved(tmp_path / "b", {"": "bfloat16"}, "float16")
    chosen = plan(model_dir=unnamed, output_dir=tmp_path / "out", dtype="float16")
    assert (chosen.targets[0].dtype, notes(chosen)) == ("float16", [])
    said = plan(model_dir=named, output_dir=tmp_path / "out")
    assert (said.targets[0].dtype, notes(said)) == ("float16", [])
    targets = [{"output_dir": tmp_path / "x", "dtype": "float16"}, {"output_dir": tmp_path / "y"}]
    both = plan(model_dir=unnamed, target=targets)
    assert ([target.dtype for target in both.targets], len(notes(both))) == (["float16", "bfloat16"], 1)


@pytest.mark.parametrize("types", [{"": "bfloat16"}, {"": "float16"}, {"norm": "float32", "": "bfloat16"}], ids=str)
def test_a_model_is_calibrated_in_the_type_that_its_target_has(types: dict[str, str], tmp_path: Path) -> None:
    model, tokens = saved(tmp_path / "model", types), tmp_path / "tokens"
    save_file({"input_ids": np.arange(16).reshape(2, 8)}, tokens)
    made = plan(model_dir=model, output_dir=tmp_path / "out", int8_kv_cache=True, calibration_tokens=tokens)
    assert made.summary()["calibration"]["dtype"] == made.targets[0].dtype == types[""]
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", tokens, "--dry_run", "--json")
    assert json.loads(headrace("calibrate", model, *words).out)["dtype"] == types[""]


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_quantized_model_is_calibrated_in_that_of_its_16_bit_tensors(name: str, tmp_path: Path) -> None:
    config = {**quantized_checkpoints.LLAMA, "torch_dtype": "bfloat16"}
    quantized_checkpoints.write(tmp_path / "model", config, FORMATS[name])
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(without_dtype(values)))
    save_file({"input_ids": np.arange(16).reshape(2, 8)}, tmp_path / "tokens")
    words = ("--output", tmp_path / "ranges", "--calibration_tokens", tmp_path / "tokens", "--dry_run", "--json")
    said = json.loads(headrace("calibrate", tmp_path / "model", *words).out)
    assert said["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_sources_have_that_of_their_16_bit_tensors(name: str, tmp_path: Path) -> None:
    config = {**quantized_checkpoints.LLAMA, "num_hidden_layers": 3 if name == "fbgemm" else 2}
    quantized_checkpoints.write(tmp_path / "model", config, FORMATS[name])
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    named = values.get("torch_dtype") or values["dtype"]
    file.write_text(json.dumps(without_dtype(values)))
    flags = {**FORMATS[name].flags, **({} if FORMATS[name].algorithm else {"dequantize": True})}
    made = plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **flags)
    assert made.targets[0].dtype == named
    assert notes(made) == [f"dtype {named}: config.json names none, and its 16-bit tensors are {named}; --dtype says another"]


def test_gguf_is_made_numbers_and_float16_as_before(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", LLAMA, checkpoints.values(LLAMA), "Q4_0")
    made = plan(model_dir=tmp_path / "model.gguf", output_dir=tmp_path / "out")
    assert (made.targets[0].dtype, notes(made)) == ("float16", [])
