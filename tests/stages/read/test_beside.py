"""--quant_ckpt_path: tensors of another file or directory stand in for the model's, module by module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline import BadInput, convert, plan
from tests.support import checkpoints, gguf_files, meta_files
from tests.support.commands import headrace, one, refused
from tests.support.directories import contents

CONFIG = {**checkpoints.LLAMA, "attention_bias": True}
# What a quantizer leaves alone comes from the model: embeddings, norms, and here a layer too.
REPLACED = ("self_attn.", "mlp.")
KINDS = ["file.safetensors", "file.bin", "file.pt", "directory", "shards", "bin directory"]


def other_values() -> dict[str, np.ndarray]:
    """The replaced tensors: of other values, and of another type than the model's. Weights alone of the second layer."""
    tensors = checkpoints.values({**CONFIG, "torch_dtype": "float32"}, seed=1)
    chosen = {name: array for name, array in tensors.items() if "layers." in name and any(part in name for part in REPLACED)}
    return {name: array for name, array in chosen.items() if ".layers.2." not in name}


def write(folder: Path, kind: str, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """Write tensors as a quantizer would; a directory has a config.json of its own."""
    folder.mkdir()
    if kind.startswith("file"):
        path = folder / kind
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save({name: meta_files.tensor(array) for name, array in tensors.items()}, path)
        return path
    if kind == "bin directory":
        torch.save({name: meta_files.tensor(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
        return folder
    checkpoints.save(folder, {**CONFIG, **config}, tensors, shards=3 if kind == "shards" else 1)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", CONFIG)
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_its_modules_stand_in_for_those_of_the_model(model: Path, kind: str, tmp_path: Path) -> None:
    others = other_values()
    path = write(tmp_path / "quantized", kind, others)
    options = {"tp_size": 2, "pp_size": 2, "dtype": "float16", "scheduler": "threads"}
    convert(model_dir=model, quant_ckpt_path=path, output_dir=tmp_path / "out", **options)
    # The same put together by hand.
    tensors = checkpoints.values(CONFIG)
    assert others.keys() < tensors.keys()
    checkpoints.save(tmp_path / "joined", CONFIG, {**tensors, **others})
    convert(model_dir=tmp_path / "joined", output_dir=tmp_path / "expected", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    convert(model_dir=model, output_dir=tmp_path / "plain", **options)
    assert contents(tmp_path / "out") != contents(tmp_path / "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_names_both(model: Path, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "quantized", kind, other_values())
    ran = headrace("plan", "--model_dir", model, "--quant_ckpt_path", path, "--output_dir", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    source = json.loads(ran.out)["source"]
    assert (source["path"], source["kind"]) == (str(model), f"Hugging Face safetensors with {path.name}")
    assert source["tensors"] == len(checkpoints.shapes(CONFIG))


def test_a_module_is_taken_whole(model: Path, tmp_path: Path) -> None:
    # The other file has a weight without its bias: the model's bias is of other weights, and does not stand in for it.
    name = "model.layers.0.self_attn.q_proj"
    others = other_values()
    del others[f"{name}.bias"]
    path = write(tmp_path / "quantized", "file.safetensors", others)
    problem = one(refused(model, "--quant_ckpt_path", path))
    assert problem.startswith(f"{name}.bias: found no such tensor")


def test_a_whole_model_beside_itself_changes_nothing(model: Path, tmp_path: Path) -> None:
    options = {"model_dir": model, "tp_size": 2, "scheduler": "threads"}
    convert(**options, output_dir=tmp_path / "plain")
    convert(**options, output_dir=tmp_path / "out", quant_ckpt_path=model)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_second_conversion_is_up_to_date_until_the_other_file_changes(model: Path, tmp_path: Path) -> None:
    others = other_values()
    path = write(tmp_path / "quantized", "file.safetensors", others)
    options = {"model_dir": model, "quant_ckpt_path": path, "output_dir": tmp_path / "out", "scheduler": "threads"}
    convert(**options)
    assert convert(**options).up_to_date
    save_file({name: array + 1 for name, array in others.items()}, path)
    assert not plan(**options).up_to_date
    assert not plan(model_dir=model, output_dir=tmp_path / "out").up_to_date


def test_a_tensor_that_belongs_nowhere(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "quantized", "file.bin", {**other_values(), "model.visual.weight": np.zeros(4, np.float32)})
    assert one(refused(model, "--quant_ckpt_path", path)).startswith("model.visual.weight: found a tensor that belongs nowhere")


SETTINGS = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"quantization_config": SETTINGS}),
        ("quantize_config.json", SETTINGS),
        ("quant_config.json", SETTINGS),
    ],
)
@pytest.mark.parametrize("kind", ["file.safetensors", "directory"])
def test_the_settings_beside_the_tensors_are_the_models(
    model: Path, kind: str, file: str, values: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "quantized", kind, other_values())
    (tmp_path / "quantized" / file).write_text(json.dumps(values))
    # The report names the method that these settings are of.
    problem = one(refused(model, "--quant_ckpt_path", path))
    assert "quantization_config: found quant_method gptq" in problem


@pytest.mark.parametrize("kind", ["file.safetensors", "directory"])
def test_a_configuration_without_settings_is_not_the_models(model: Path, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "quantized", kind, other_values())
    (tmp_path / "quantized" / "config.json").write_text(json.dumps({"vocab_size": 5, "quantization_config": None}))
    convert(model_dir=model, quant_ckpt_path=path, output_dir=tmp_path / "out", scheduler="threads")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == CONFIG["vocab_size"]


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_settings_that_cannot_be_read_are_named(model: Path, file: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "quantized", "file.safetensors", other_values())
    (tmp_path / "quantized" / file).write_bytes(text.encode("latin-1"))
    assert one(refused(model, "--quant_ckpt_path", path)).startswith(f"{tmp_path / 'quantized' / file}: found ")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_file_has_nothing_to_stand_in_for(kind: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), kind)
    path = write(tmp_path / "quantized", "directory", other_values())
    problem = one(refused(tmp_path / "model.gguf", "--quant_ckpt_path", path))
    assert problem == f"--quant_ckpt_path: found a GGUF ({kind}) as --model_dir; expected a Hugging Face model"


def test_nor_has_a_meta_checkpoint(tmp_path: Path) -> None:
    meta_files.write(tmp_path / "model", checkpoints.LLAMA, checkpoints.values(checkpoints.LLAMA), 2)
    path = write(tmp_path / "quantized", "directory", other_values())
    problem = one(refused(tmp_path / "model", "--quant_ckpt_path", path))
    assert problem == "--quant_ckpt_path: found a Meta checkpoint (2 parts) as --model_dir; expected a Hugging Face model"


@pytest.mark.parametrize("name", ["gone", "gone/deeper", "gone.safetensors", "x" * 300])
def test_a_path_that_is_not_there(model: Path, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert one(refused(model, "--quant_ckpt_path", path)).startswith(f"--quant_ckpt_path {path}: found ")


@pytest.mark.parametrize("name", ["weights.npz", "weights.gguf", "weights", "weights.safetensors.index.json"])
def test_a_file_of_an_unknown_kind_lists_those_known(model: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    problem = one(refused(model, "--quant_ckpt_path", tmp_path / name))
    assert problem.startswith(f"--quant_ckpt_path {tmp_path / name}: found a ")
    assert problem.endswith("expected one of .safetensors, .bin, .pt")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights.pt"])
def test_a_damaged_file_is_named(model: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no weights")
    assert one(refused(model, "--quant_ckpt_path", tmp_path / name)).startswith(f"{tmp_path / name}: found ")


@pytest.mark.parametrize("held", [[], ["config.json"], ["notes.txt", "weights.npz"]], ids=str)
def test_a_directory_without_weights(model: Path, held: list[str], tmp_path: Path) -> None:
    (tmp_path / "quantized").mkdir()
    for name in held:
        (tmp_path / "quantized" / name).write_text("{}")
    problem = one(refused(model, "--quant_ckpt_path", tmp_path / "quantized"))
    assert problem.startswith(f"{tmp_path / 'quantized'}: found {', '.join(held) or 'nothing'}; expected model.safetensors")


def test_it_needs_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    path = write(tmp_path / "quantized", "directory", other_values())
    ran = headrace("convert", "--quant_ckpt_path", path, "--output_dir", tmp_path / "out")
    assert ran.code == 2
    assert f"--quant_ckpt_path: found {path} alone; expected --model_dir with the model that it was quantized from" in ran.err
    with pytest.raises(BadInput, match="--quant_ckpt_path"):
        plan(meta_ckpt_dir=tmp_path / "model", quant_ckpt_path=path, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_over_the_quantized_directory_is_refused(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "quantized", "directory", other_values())
    before = contents(path)
    with pytest.raises(BadInput):
        convert(model_dir=model, quant_ckpt_path=path, output_dir=path, scheduler="threads")
    assert contents(path) == before
