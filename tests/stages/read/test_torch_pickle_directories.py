"""read, PyTorch files: directories of .bin files, whole and in shards, are those of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.read import open_source, read
from tests.support import checkpoints
from tests.support.commands import convert
from tests.support.lazy import values
from tests.support.torch_files import both_formats, saved


def as_torch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def write_bin(directory: Path, *, shards: int = 1, index: bool = True, zipped: bool = True) -> dict[str, np.ndarray]:
    """The tests' Llama as .bin files; returns its tensors."""
    arrays = checkpoints.values(checkpoints.LLAMA)
    state = as_torch(arrays)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(checkpoints.LLAMA))
    names = list(state)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
    for n, file in enumerate(files):
        saved(directory / file, {name: state[name] for name in names[n::shards]}, zipped=zipped)
    if index:
        weight_map = {name: files[n % shards] for n, name in enumerate(names)}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return arrays


@both_formats
@pytest.mark.parametrize(("shards", "index"), [(1, False), (3, True), (3, False)])
def test_directories_of_bin_files(shards: int, index: bool, zipped: bool, tmp_path: Path) -> None:
    arrays = write_bin(tmp_path / "model", shards=shards, index=index, zipped=zipped)
    source = open_source(tmp_path / "model")
    assert (source.kind, source.container, source.dtype) == ("Hugging Face PyTorch .bin", "huggingface", "float16")
    assert len(source.files) == shards + 1
    assert source.tensors.keys() == arrays.keys()
    for name, array in read(source.tensors, 1000, 4).items():
        assert values(array).tobytes() == arrays[name].tobytes()


def test_a_directory_without_a_configuration_is_still_known(tmp_path: Path) -> None:
    # As one of Hugging Face: what it lacks is named.
    write_bin(tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    ran = convert(tmp_path / "model", tmp_path / "out")
    assert ran.code == 2
    assert f"{tmp_path / 'model/config.json'}: found no such file" in ran.err


def test_safetensors_come_first(tmp_path: Path) -> None:
    write_bin(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    arrays = checkpoints.write(tmp_path, checkpoints.LLAMA, seed=1)
    source = open_source(tmp_path)
    assert source.kind == "Hugging Face safetensors"
    found = np.asarray(source.tensors["model.norm.weight"].block(((0, 64),)))
    assert found.tobytes() == arrays["model.norm.weight"].tobytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_files_beside_the_weights_are_not_opened(shards: int, tmp_path: Path) -> None:
    arrays = write_bin(tmp_path, shards=shards, index=False)
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "rng_state.pth", "other_model.bin"):
        (tmp_path / name).write_bytes(b"never opened")
    source = open_source(tmp_path)
    assert source.tensors.keys() == arrays.keys()
    assert {file.path.name for file in source.files}.isdisjoint({"training_args.bin", "optimizer.bin"})


@both_formats
def test_ranks_are_those_of_the_same_model_in_safetensors(zipped: bool, tmp_path: Path) -> None:
    # A few weights transposed in memory, as old training code left them, and embeddings that share a storage with the head.
    arrays = checkpoints.write(tmp_path / "safetensors", checkpoints.LLAMA)
    write_bin(tmp_path / "bin", zipped=zipped)
    state = as_torch(arrays)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        state[name] = state[name].T.contiguous().T
    both = torch.cat([state["model.embed_tokens.weight"], state["model.layers.2.mlp.up_proj.weight"]])
    state["model.embed_tokens.weight"], state["model.layers.2.mlp.up_proj.weight"] = both[:96], both[96:]
    saved(tmp_path / "bin/pytorch_model.bin", state, zipped=zipped)
    (tmp_path / "bin/pytorch_model.bin.index.json").unlink()
    for kind in ("safetensors", "bin"):
        ran = convert(tmp_path / kind, tmp_path / f"{kind}-out", "--tp_size", 2, "--dtype", "float32")
        assert ran.code == 0, ran.err
    for name in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        assert (tmp_path / "bin-out" / name).read_bytes() == (tmp_path / "safetensors-out" / name).read_bytes()
