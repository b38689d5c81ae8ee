"""model.safetensors.index.json and the shards that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.support import checkpoints
from tests.support.commands import convert, one, refused

SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA, shards=3)
    return tmp_path / "model"


def weight_map(model: Path) -> dict[str, str]:
    return json.loads((model / INDEX).read_text())["weight_map"]


def set_weight_map(model: Path, value: Any) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": value}))


def test_the_checkpoint_that_these_tests_damage_is_sound(model: Path, tmp_path: Path) -> None:
    assert convert(model, tmp_path / "out").code == 0


def test_a_missing_shard(model: Path) -> None:
    (model / SHARDS[1]).unlink()
    problem = one(refused(model))
    assert problem.startswith(f"{model / SHARDS[1]}: found no such file; expected the 10 tensors that {INDEX} says it holds")


def test_every_missing_shard_is_named_in_one_report(model: Path) -> None:
    for shard in SHARDS[:2]:
        (model / shard).unlink()
    problems = refused(model)
    assert [problem.partition(": ")[0] for problem in problems] == [str(model / shard) for shard in SHARDS[:2]]


@pytest.mark.parametrize("away", ["../", "sub/../../", "..\\", "sub\\..\\..\\"])
def test_a_shard_outside_the_directory(model: Path, away: str) -> None:
    # The file is there, so that only the path can be what is refused.
    (model / "sub").mkdir()
    outside = model.parent / "outside.safetensors"
    shutil.copy(model / SHARDS[0], outside)
    shutil.copy(outside, model / f"{away}outside.safetensors".replace("/", "_"))
    names = {name: f"{away}outside.safetensors" if file == SHARDS[0] else file for name, file in weight_map(model).items()}
    set_weight_map(model, names)
    problem = one(refused(model))
    assert problem.startswith(f"{model / INDEX}: found the shard '{away}outside.safetensors'".replace("\\", "\\\\"))
    assert "a file inside the directory" in problem


def test_a_shard_by_absolute_path(model: Path) -> None:
    names = {name: str(model / file) for name, file in weight_map(model).items()}
    set_weight_map(model, names)
    problems = refused(model)
    assert len(problems) == 3
    assert all(problem.startswith(f"{model / INDEX}: found the shard '{model}/model-0000") for problem in problems)


@pytest.mark.parametrize("file", ["", ".", "sub", "no\0name", "x" * 5000, "\ud800"])
def test_a_shard_name_that_is_no_file(model: Path, file: str) -> None:
    (model / "sub").mkdir()
    set_weight_map(model, {**weight_map(model), "model.norm.weight": file})
    assert str(model) in refused(model)[0]


@pytest.mark.parametrize("text", ["", "{", "not json", "\xff", '{"weight_map": {"a": "b"}', "[" * 100_000])
def test_an_index_that_is_not_json(model: Path, text: str) -> None:
    (model / INDEX).write_bytes(text.encode("latin-1"))
    problem = one(refused(model))
    assert problem.startswith(f"{model / INDEX}: found text that is not JSON")


@pytest.mark.parametrize("value", [{}, [], None, "a", {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {}}])
def test_a_weight_map_that_is_none(model: Path, value: Any) -> None:
    set_weight_map(model, value)
    assert one(refused(model)).startswith(f"{model / INDEX}: weight_map: found ")


def test_an_index_without_a_weight_map(model: Path) -> None:
    (model / INDEX).write_text("{}")
    assert one(refused(model)).startswith(f"{model / INDEX}: weight_map: found ")


def test_an_index_that_is_a_list(model: Path) -> None:
    (model / INDEX).write_text("[]")
    assert one(refused(model)).startswith(f"{model / INDEX}: found a JSON list")


def test_an_index_that_is_a_directory(model: Path) -> None:
    (model / INDEX).unlink()
    (model / INDEX).mkdir()
    assert any(INDEX in problem for problem in refused(model))


@pytest.mark.parametrize("indexed", [True, False])
def test_the_same_tensor_in_two_shards(model: Path, indexed: bool) -> None:
    tensors = load_file(model / SHARDS[1])
    twice = "model.norm.weight"
    assert twice in load_file(model / SHARDS[1])
    other = load_file(model / SHARDS[2])
    save_file({**other, twice: tensors[twice]}, model / SHARDS[2])
    if not indexed:
        (model / INDEX).unlink()
    problem = one(refused(model))
    assert problem.startswith(f"{twice}: found the tensor in both {SHARDS[1]} and {SHARDS[2]}; expected one home")


def test_a_tensor_that_its_shard_lacks(model: Path) -> None:
    set_weight_map(model, {**weight_map(model), "model.layers.0.self_attn.extra.weight": SHARDS[2]})
    problem = one(refused(model))
    assert problem.startswith(f"model.layers.0.self_attn.extra.weight: found no such tensor in {SHARDS[2]}")
    assert INDEX in problem


def test_a_tensor_that_its_shard_has_lost(model: Path) -> None:
    tensors = load_file(model / SHARDS[1])
    del tensors["model.norm.weight"]
    save_file(tensors, model / SHARDS[1])
    problem = one(refused(model))
    assert problem.startswith(f"model.norm.weight: found no such tensor in {SHARDS[1]}")


def test_a_tensor_that_its_shard_in_a_folder_lacks(model: Path) -> None:
    (model / "sub").mkdir()
    (model / SHARDS[2]).rename(model / "sub" / SHARDS[2])
    moved = {name: f"sub/{file}" if file == SHARDS[2] else file for name, file in weight_map(model).items()}
    set_weight_map(model, {**moved, "model.extra.weight": f"sub/{SHARDS[2]}"})
    assert one(refused(model)).startswith(f"model.extra.weight: found no such tensor in sub/{SHARDS[2]}")


def test_a_shard_in_a_folder_is_read(model: Path, tmp_path: Path) -> None:
    (model / "sub").mkdir()
    (model / SHARDS[2]).rename(model / "sub" / SHARDS[2])
    set_weight_map(model, {name: f"sub/{file}" if file == SHARDS[2] else file for name, file in weight_map(model).items()})
    assert convert(model, tmp_path / "out").code == 0


def test_links_out_of_the_directory_are_read_as_in_the_hub_cache(model: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for shard in SHARDS:
        (model / shard).rename(tmp_path / "blobs" / shard)
        (model / shard).symlink_to(tmp_path / "blobs" / shard)
    assert convert(model, tmp_path / "out").code == 0


def test_problems_of_index_shards_and_configuration_come_in_one_report(model: Path) -> None:
    (model / SHARDS[0]).write_bytes(b"damaged")
    (model / SHARDS[1]).unlink()
    set_weight_map(model, {**weight_map(model), "a.weight": "../away.safetensors", "b.weight": SHARDS[2]})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": []}))
    report = "\n".join(refused(model))
    for subject in (SHARDS[0], SHARDS[1], "../away.safetensors", "b.weight", "architectures"):
        assert subject in report
