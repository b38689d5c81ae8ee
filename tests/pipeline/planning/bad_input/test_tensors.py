"""Tensors that are missing, too many, of another shape or type than config.json says, or damaged in their files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.printed import printed
from tests.stages.read.test_safetensors_header import DAMAGED
from tests.support import checkpoints
from tests.support.commands import convert, one, refused

LLAMA, MIXTRAL = checkpoints.LLAMA, checkpoints.MIXTRAL
TIED = {**LLAMA, "tie_word_embeddings": True}


def model_of(tmp_path: Path, config: dict[str, Any], *, without: tuple[str, ...] = (), **changed: Any) -> Path:
    """A checkpoint less some tensors, and with others: `changed` is tensor name (with _ for .) to an array or a shape."""
    tensors = checkpoints.values(config)
    for name in without:
        del tensors[name]
    for name, value in changed.pop("more", {}).items():
        tensors[name] = np.zeros(value, np.float16) if isinstance(value, tuple) else value
    checkpoints.save(tmp_path / "model", config, tensors)
    return tmp_path / "model"


@pytest.mark.parametrize("name", sorted(checkpoints.shapes({**LLAMA, "attention_bias": True})))
def test_any_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    config = {**LLAMA, "attention_bias": True}
    problem = one(refused(model_of(tmp_path, config, without=(name,))))
    assert problem.startswith(f"{name}: found no such tensor; expected shape {list(checkpoints.shapes(config)[name])}")


@pytest.mark.parametrize("name", ["experts.3.w1", "experts.0.w2", "experts.2.w3", "gate"])
def test_a_missing_expert_or_router_is_named(tmp_path: Path, name: str) -> None:
    name = f"model.layers.1.block_sparse_moe.{name}.weight"
    assert one(refused(model_of(tmp_path, MIXTRAL, without=(name,)))).startswith(f"{name}: found no such tensor")


def test_all_missing_tensors_come_in_one_report(tmp_path: Path) -> None:
    names = tuple(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3))
    assert [problem.partition(":")[0] for problem in refused(model_of(tmp_path, LLAMA, without=names))] == list(names)


def test_of_very_many_problems_the_first_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    names = tuple(name for name in checkpoints.shapes(LLAMA) if "layers" in name)
    model = model_of(tmp_path, LLAMA, without=names)
    report = convert(model, tmp_path / "out").err
    assert f"{len(names)} problems" in report
    assert f"... and {len(names) - 20} more" in report


UNCONSUMED = {
    "a stranger": (LLAMA, "model.vision_tower.weight"),
    "without a dot": (LLAMA, "weight"),
    "empty name": (LLAMA, ""),
    "k_proj.bias": (LLAMA, "model.layers.1.self_attn.k_proj.bias"),
    "down_proj.bias": (LLAMA, "model.layers.1.mlp.down_proj.bias"),
    "norm.bias": (LLAMA, "model.norm.bias"),
    "a layer too many": (LLAMA, "model.layers.3.self_attn.k_proj.weight"),
    "a layer far off": (LLAMA, "model.layers.99999999999.input_layernorm.weight"),
    "a layer of 5,000 digits": (LLAMA, f"model.layers.{'9' * 5000}.input_layernorm.weight"),
    "a parameter of a quantized model": (LLAMA, "model.layers.0.mlp.up_proj.weight_scale"),
    "an expert of a dense model": (LLAMA, "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    "the MLP of a model with experts": (MIXTRAL, "model.layers.0.mlp.up_proj.weight"),
    "an expert too many": (MIXTRAL, "model.layers.0.block_sparse_moe.experts.4.w1.weight"),
}


@pytest.mark.parametrize("case", UNCONSUMED)
def test_a_tensor_that_nothing_consumes_is_named(tmp_path: Path, case: str) -> None:
    config, name = UNCONSUMED[case]
    shape = checkpoints.shapes(config).get(name.replace(".3.", ".2.").replace("bias", "weight"), (64,))[:1]
    problem = one(refused(model_of(tmp_path, config, more={name: shape})))
    assert problem.startswith(f"{printed(name)}: found a tensor that ")


def test_buffers_that_the_runtime_computes_are_no_strangers(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA, more={"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    assert convert(model, tmp_path / "out").code == 0


def test_biases_of_the_mlp_are_refused_only_where_asked(tmp_path: Path) -> None:
    model = model_of(tmp_path, {**LLAMA, "mlp_bias": True})
    problems = refused(model, "--mlp_bias", "refuse")
    assert len(problems) == 9
    assert problems[0].startswith("model.layers.0.mlp.down_proj.bias: found a bias of the MLP")
    assert convert(model, tmp_path / "out").code == 0


@pytest.mark.parametrize("name", sorted(checkpoints.shapes(LLAMA)))
def test_any_shape_that_contradicts_the_configuration_is_named(tmp_path: Path, name: str) -> None:
    shape = checkpoints.shapes(LLAMA)[name]
    found = (shape[0] + 8, *shape[1:])
    problem = one(refused(model_of(tmp_path, LLAMA, more={name: found})))
    assert problem.startswith(f"{name}: found shape {list(found)}; expected {list(shape)}")


ODD_SHAPES = [(), (0,), (0, 64), (96, 0), (64, 96), (96, 64, 1), (1,) * 70, (96 * 64,)]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda shape: f"{len(shape)} axes {shape[:3]}")
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_odd_shapes_of_both_embeddings_are_named(tmp_path: Path, config: dict[str, Any], shape: tuple[int, ...]) -> None:
    # Those of a tied model are compared, which must stand such shapes too.
    model = model_of(tmp_path, config)
    odd = dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), shape)
    save_zeros(model / "model.safetensors", {**checkpoints.shapes(config), **odd})
    assert any("model.embed_tokens.weight: found" in problem and "shape" in problem for problem in refused(model))


def save_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of float16 zeros, written by hand: NumPy has no arrays of more than 64 axes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool"])
def test_values_that_are_no_weights(tmp_path: Path, dtype: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    problem = one(refused(model_of(tmp_path, LLAMA, more={name: np.zeros((160, 64), dtype)})))
    assert problem.startswith(f"{name}: found values of type ")


def test_a_second_copy_of_tied_embeddings_that_differs(tmp_path: Path) -> None:
    model = model_of(tmp_path, TIED, more={"lm_head.weight": np.ones((96, 64), np.float16)})
    problem = one(refused(model))
    assert problem.startswith("lm_head.weight: found other values, though the configuration says tied")
    assert "model.embed_tokens.weight" in problem


def test_a_second_copy_of_tied_embeddings_that_is_one(tmp_path: Path) -> None:
    copy = checkpoints.values(TIED)["model.embed_tokens.weight"]
    assert convert(model_of(tmp_path, TIED, more={"lm_head.weight": copy}), tmp_path / "out").code == 0


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_safetensors_files(tmp_path: Path, case: str) -> None:
    model = model_of(tmp_path, LLAMA)
    (model / "model.safetensors").write_bytes(DAMAGED[case][0])
    assert all(problem.startswith(f"{model / 'model.safetensors'}: ") for problem in refused(model))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.999])
def test_a_safetensors_file_cut_short(tmp_path: Path, keep: float) -> None:
    model = model_of(tmp_path, LLAMA)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert refused(model)[0].startswith(f"{path}: ")


def test_two_damaged_files_come_in_one_report(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", LLAMA, shards=3)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    for shard in shards[:2]:
        shard.write_bytes(b"")
    assert [problem.partition(": ")[0] for problem in refused(tmp_path / "model")] == [str(shard) for shard in shards[:2]]


def test_missing_unconsumed_and_contradicting_tensors_come_in_one_report(tmp_path: Path) -> None:
    model = model_of(
        tmp_path,
        LLAMA,
        without=("model.norm.weight",),
        more={"lm_head.weight": (8, 8), "model.layers.0.self_attn.q_proj.bias": (64,)},
    )
    report = "\n".join(refused(model))
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert f"{name}: found" in report


def test_strangers_sizes_and_missing_tensors_come_in_one_report(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA, without=("model.norm.weight",), more={"stranger.weight": (8,)})
    report = "\n".join(refused(model, "--tp_size", 3))
    for subject in ("--tp_size 3: found", "stranger.weight: found", "model.norm.weight: found"):
        assert subject in report


def test_extra_files_that_no_index_names_are_left_alone(tmp_path: Path) -> None:
    model = model_of(tmp_path, LLAMA)
    save_file({"other.weight": np.zeros(3, np.float16)}, model / "adapter.safetensors")
    assert convert(model, tmp_path / "out").code == 0


def test_a_model_whose_files_are_not_there_is_one_problem(tmp_path: Path) -> None:
    config = {**LLAMA, "num_hidden_layers": 30}
    names = tuple(name for name in checkpoints.shapes(config) if "layers" in name)
    problem = one(refused(model_of(tmp_path, config, without=names)))
    assert f"found {len(names)} of {len(names) + 3} tensors are not there: model.layers.0.input_layernorm.weight, " in problem
