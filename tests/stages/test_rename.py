"""rename: a bijection on names, less what is ignored, plus ties."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.tables import Family, find_family, layout
from pipeline.tensor.names import TensorName, split_name, split_names
from stages.read import read
from stages.rename import Matches, match, rename
from tests.support.checkpoints import LLAMA, MIXTRAL, shapes
from tests.support.lazy import held, texts

CONFIGS = {
    "llama": LLAMA,
    "bias": {**LLAMA, "attention_bias": True},
    "head_dim": {**LLAMA, "head_dim": 16},
    "mixtral": MIXTRAL,
}
LM_HEAD, EMBEDDING = TensorName("lm_head", "weight"), TensorName("model.embed_tokens", "weight")


def family_of(config: dict) -> tuple[Family, ModelConfig]:
    architecture = config["architectures"][0]
    family = find_family("huggingface", architecture)
    assert family is not None
    return family, model_config(config, family, architecture, "config.json")


def matched(config: dict, *more: str, less: tuple[str, ...] = (), keep: frozenset[str] = frozenset()) -> Matches:
    family, model = family_of(config)
    names = [split_name(name) for name in (*shapes(config), *more) if name not in less]
    return match(dict.fromkeys(names), family, layout(family.layout), model, keep)


def origin_texts(matches: Matches) -> dict[str, str]:
    return {name: str(source) for name, source in texts(matches.origins).items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_are_a_bijection(config: dict) -> None:
    matches = matched(config)
    assert not matches.problems
    sources = [renamed.source for renamed in matches.names.values()]
    assert {str(source) for source in sources} == shapes(config).keys()
    assert len(sources) == len(matches.names)
    assert (dict(matches.ties), dict(matches.left_out), dict(matches.copies)) == ({}, {}, {})
    assert matches.origins == {name: renamed.source for name, renamed in matches.names.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_arrays_are_the_same_objects(config: dict) -> None:
    matches, (_, model) = matched(config), family_of(config)
    arrays = {name: np.zeros(shape, dtype=np.float16) for name, shape in split_names(shapes(config)).items()}
    tensors = read(held(arrays), 1 << 20, 1)
    result = rename(tensors, matches, model)
    assert len(result) == len(tensors)
    for name, renamed in matches.names.items():
        assert result[name] is tensors[renamed.source]


def test_gate_and_up_change_their_names() -> None:
    origins = origin_texts(matched(LLAMA))
    assert origins["transformer.layers.1.mlp.fc.weight"] == "model.layers.1.mlp.gate_proj.weight"
    assert origins["transformer.layers.1.mlp.gate.weight"] == "model.layers.1.mlp.up_proj.weight"
    experts = "model.layers.1.block_sparse_moe.experts.3"
    origins = origin_texts(matched(MIXTRAL))
    assert origins["transformer.layers.1.mlp.fc.3.gate.weight"] == f"{experts}.w1.weight"
    assert origins["transformer.layers.1.mlp.fc.3.up.weight"] == f"{experts}.w3.weight"
    assert origins["transformer.layers.1.mlp.proj.3.weight"] == f"{experts}.w2.weight"


@pytest.mark.parametrize("declared", [True, None])
def test_a_missing_lm_head_is_the_embedding(declared: bool | None) -> None:
    config = {**LLAMA, "tie_word_embeddings": declared}
    matches = matched(config, less=("lm_head.weight",))
    assert matches.ties == {LM_HEAD: EMBEDDING}
    assert matches.origins[LM_HEAD] == EMBEDDING
    tensors = read(held({renamed.source: np.zeros(2) for renamed in matches.names.values()}), 1 << 20, 1)
    result = rename(tensors, matches, family_of(config)[1])
    assert result[LM_HEAD] is result[TensorName("transformer.vocab_embedding", "weight")]


def test_a_second_copy_of_a_tied_embedding_is_left_out() -> None:
    matches = matched({**LLAMA, "tie_word_embeddings": True}, "lm_head.weight")
    assert matches.copies == {LM_HEAD: EMBEDDING}
    assert matches.left_out.keys() == {LM_HEAD}
    assert matches.ties == {LM_HEAD: EMBEDDING}
    assert LM_HEAD not in matches.names
    assert not matches.problems


@pytest.mark.parametrize("declared", [False, None])
def test_an_lm_head_of_its_own_is_kept(declared: bool | None) -> None:
    matches = matched({**LLAMA, "tie_word_embeddings": declared}, "lm_head.weight")
    assert matches.names[LM_HEAD].source == LM_HEAD
    assert not matches.ties


def test_untied_without_an_lm_head_stays_missing() -> None:
    assert not matched(LLAMA, less=("lm_head.weight",)).ties


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_buffers_are_ignored(name: str) -> None:
    matches = matched(LLAMA, name)
    assert not matches.problems
    assert split_name(name) not in matches.origins.values()
    assert split_name(name) not in matches.left_out


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.extra.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
        "vision.tower.weight",
        "weight",
        "",
    ],
)
def test_a_tensor_that_belongs_nowhere_is_a_problem(name: str) -> None:
    (problem,) = matched(LLAMA, name).problems
    assert problem.subject == name
    assert problem.remedy


def test_two_tensors_of_one_target_are_a_problem() -> None:
    (problem,) = matched(LLAMA, "model.layers.00.mlp.up_proj.weight").problems
    assert "model.layers.0.mlp.up_proj.weight" in problem.found


def test_two_names_of_one_router_are_a_problem() -> None:
    """transformers 5 has another name for it: a checkpoint has one of the two."""
    (problem,) = matched(MIXTRAL, "model.layers.2.mlp.gate.weight").problems
    assert "model.layers.2.block_sparse_moe.gate.weight" in problem.found


def test_biases_of_the_mlp_are_left_out_unless_they_are_to_be_kept() -> None:
    config = {**LLAMA, "mlp_bias": True}
    biases = {name for name in split_names(shapes(config)) if ".mlp." in name.module and name.parameter == "bias"}
    assert biases
    assert matched(config).left_out.keys() == biases
    kept = matched(config, keep=frozenset({"mlp_bias"}))
    assert not kept.left_out
    assert biases <= set(kept.origins.values())
