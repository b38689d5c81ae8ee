"""load_from_gptq_llama: one rank's tensors are those that `convert` writes, from a directory or from a file beside its model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import BadInput, convert, load_from_gptq_llama, load_from_hf_checkpoint
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.quantized_checkpoints import LLAMA

SHAPES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp": {"tp_size": 2},
    "kv heads shared": {"tp_size": 4, "dtype": "bfloat16"},
    "stages": {"tp_size": 2, "pp_size": 2, "sm": 90},
    "dequantized": {"tp_size": 2, "dequantize": True},
    "int8": {"tp_size": 2, "dequantize": True, "use_weight_only": True},
    "again": {"tp_size": 2, "requantize": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    source.write(folder / "model", LLAMA, source.gptq(sym=False), shards=2)
    return folder / "model"


def same_as_written(output: Path, options: dict[str, Any], path: Path, **more: Any) -> None:
    """Every rank, loaded, is the rank file."""
    tp, pp = options.get("tp_size", 1), options.get("pp_size", 1)
    for rank in range(tp * pp):
        loaded = load_from_gptq_llama(path, tp_rank=rank % tp, pp_rank=rank // tp, **options, **more)
        written = load_file(output / f"rank{rank}.safetensors")
        assert set(loaded) == set(written)
        assert len(loaded) == len(written)
        for name, wanted in written.items():
            found = loaded[name]
            assert (found.dtype, found.shape, loaded.shape(name)) == (wanted.dtype, wanted.shape, tuple(wanted.shape)), name
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name


@pytest.mark.parametrize("case", SHAPES)
def test_a_directory(model: Path, case: str, tmp_path: Path) -> None:
    options = SHAPES[case]
    convert(model_dir=model, output_dir=tmp_path / "out", scheduler="threads", **options)
    same_as_written(tmp_path / "out", options, model)


@pytest.mark.parametrize("single", [True, False], ids=["file", "directory"])
@pytest.mark.parametrize("case", ["one rank", "stages"])
def test_beside_the_model_that_it_was_made_from(single: bool, case: str, tmp_path: Path) -> None:
    options, kind = SHAPES[case], source.gptq()
    tensors = source.values(LLAMA)
    checkpoints.save(tmp_path / "base", LLAMA, tensors)
    source.write(tmp_path / "whole", LLAMA, kind, tensors=tensors)
    stored, _ = source.quantized(tensors, source.gptq(), 2)
    # What quantizers save of a model for this flag: its linear modules, and their settings.
    packed = {
        name: values for name, values in stored.items() if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
    }
    checkpoints.save(tmp_path / "packed", source.described(LLAMA, kind), packed)
    path = tmp_path / "packed" / "model.safetensors" if single else tmp_path / "packed"
    convert(model_dir=tmp_path / "whole", output_dir=tmp_path / "out", scheduler="threads", **options)
    same_as_written(tmp_path / "out", options, path, model_dir=tmp_path / "base")
    beside = {"model_dir": tmp_path / "base", "quant_ckpt_path": path, "output_dir": tmp_path / "beside", "scheduler": "threads"}
    convert(**beside, **options)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "beside" / file.name).read_bytes() == file.read_bytes()


def test_a_file_of_tensors_whose_settings_are_nowhere(tmp_path: Path) -> None:
    """The tensors alone say enough of a file of the first version."""
    tensors = source.values(LLAMA)
    checkpoints.save(tmp_path / "base", LLAMA, tensors)
    stored, _ = source.quantized(tensors, source.gptq(sym=False), 2)
    checkpoints.save(tmp_path / "packed", LLAMA, stored)
    shutil.move(tmp_path / "packed" / "model.safetensors", tmp_path / "alone.safetensors")
    source.write(tmp_path / "whole", LLAMA, source.gptq(sym=False), tensors=tensors)
    convert(model_dir=tmp_path / "whole", output_dir=tmp_path / "out", scheduler="threads")
    same_as_written(tmp_path / "out", {}, tmp_path / "alone.safetensors", model_dir=tmp_path / "base")


def test_what_the_configuration_says(model: Path) -> None:
    config = load_from_gptq_llama(model, tp_size=2).config
    assert config["quantization"]["quant_algo"] == "W4A16_GPTQ"
    assert config["quantization"]["group_size"] == 64
    assert config["mapping"]["tp_size"] == 2


def test_the_generation_decides_the_order(model: Path) -> None:
    name = "transformer.layers.0.mlp.fc.weight"
    ampere, hopper = (load_from_gptq_llama(model, sm=sm)[name] for sm in (80, 90))
    assert not torch.equal(ampere.view(torch.uint8), hopper.view(torch.uint8))
    assert torch.equal(load_from_gptq_llama(model)[name].view(torch.uint8), ampere.view(torch.uint8))


def test_other_quantized_checkpoints_load_as_any(tmp_path: Path) -> None:
    for name in ("awq", "modelopt fp8", "compressed w4a16", "modelopt awq", "compressed fp8 dynamic"):
        source.write(tmp_path / name, LLAMA, source.formats()[name])
        convert(model_dir=tmp_path / name, output_dir=tmp_path / f"{name}-out", tp_size=2, scheduler="threads")
        loaded = load_from_hf_checkpoint(tmp_path / name, tp_size=2, tp_rank=1)
        written = load_file(tmp_path / f"{name}-out/rank1.safetensors")
        assert set(loaded) == set(written)
        assert all(loaded[key].dtype == wanted.dtype for key, wanted in written.items())
        assert all(torch.equal(loaded[key].view(torch.uint8), wanted.view(torch.uint8)) for key, wanted in written.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank"),
        ({"group_size": 128}, "--group_size 128"),
        ({"use_fp8": True}, "--use_fp8"),
        ({"sm": 70}, "sm"),
        ({"sm": "any"}, "--sm any"),
        ({"output_dir": "here"}, "output_dir"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_from_gptq_llama(model, **options)


def test_a_missing_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="gone"):
        load_from_gptq_llama(tmp_path / "gone.safetensors", model_dir=model)
