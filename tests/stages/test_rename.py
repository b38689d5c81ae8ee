"""rename: a bijection on names, less what is ignored, plus ties; operations have inverses and run block by block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.model_config import ModelConfig, model_config
from pipeline.operations import OPERATIONS
from pipeline.placement import slices
from pipeline.tables import Family, find_family, layout
from stages.read import read
from stages.rename import Matches, match, operate, rename
from tests.checkpoints import LLAMA, MIXTRAL, shapes
from tests.lazy import block, held, values
from tests.strategies import regions

CONFIGS = {
    "llama": LLAMA,
    "bias": {**LLAMA, "attention_bias": True},
    "head_dim": {**LLAMA, "head_dim": 16},
    "mixtral": MIXTRAL,
}


def family_of(config: dict) -> tuple[Family, ModelConfig]:
    architecture = config["architectures"][0]
    family = find_family("huggingface", architecture)
    assert family is not None
    return family, model_config(config, family, architecture, "config.json")


def matched(config: dict, *more: str, less: tuple[str, ...] = (), keep: frozenset[str] = frozenset()) -> Matches:
    family, model = family_of(config)
    names = [name for name in (*shapes(config), *more) if name not in less]
    return match(dict.fromkeys(names), family, layout(family.layout), model, keep)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_are_a_bijection(config: dict) -> None:
    matches = matched(config)
    assert not matches.problems
    assert matches.names.keys() == shapes(config).keys()
    targets = [name for name, _ in matches.names.values()]
    assert len(set(targets)) == len(targets)
    assert (dict(matches.ties), dict(matches.left_out), dict(matches.copies)) == ({}, {}, {})
    assert matches.origins == {name: source for source, (name, _) in matches.names.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_arrays_are_the_same_objects(config: dict) -> None:
    matches, (_, model) = matched(config), family_of(config)
    tensors = read(held({name: np.zeros(shape, dtype=np.float16) for name, shape in shapes(config).items()}), 1 << 20, 1)
    result = rename(tensors, matches, model)
    assert len(result) == len(tensors)
    for name, (new, _) in matches.names.items():
        assert result[new] is tensors[name]


def test_gate_and_up_change_their_names() -> None:
    names = matched(LLAMA).names
    assert names["model.layers.1.mlp.gate_proj.weight"][0] == "transformer.layers.1.mlp.fc.weight"
    assert names["model.layers.1.mlp.up_proj.weight"][0] == "transformer.layers.1.mlp.gate.weight"
    experts = "model.layers.1.block_sparse_moe.experts.3"
    names = matched(MIXTRAL).names
    assert names[f"{experts}.w1.weight"][0] == "transformer.layers.1.mlp.fc.3.gate.weight"
    assert names[f"{experts}.w3.weight"][0] == "transformer.layers.1.mlp.fc.3.up.weight"
    assert names[f"{experts}.w2.weight"][0] == "transformer.layers.1.mlp.proj.3.weight"


@pytest.mark.parametrize("declared", [True, None])
def test_a_missing_lm_head_is_the_embedding(declared: bool | None) -> None:
    config = {**LLAMA, "tie_word_embeddings": declared}
    matches = matched(config, less=("lm_head.weight",))
    assert matches.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert matches.origins["lm_head.weight"] == "model.embed_tokens.weight"
    tensors = read(held({name: np.zeros(2) for name in matches.names}), 1 << 20, 1)
    result = rename(tensors, matches, family_of(config)[1])
    assert result["lm_head.weight"] is result["transformer.vocab_embedding.weight"]


def test_a_second_copy_of_a_tied_embedding_is_left_out() -> None:
    matches = matched({**LLAMA, "tie_word_embeddings": True}, "lm_head.weight")
    assert matches.copies == {"lm_head.weight": "model.embed_tokens.weight"}
    assert matches.left_out.keys() == {"lm_head.weight"}
    assert matches.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in matches.names
    assert not matches.problems


@pytest.mark.parametrize("declared", [False, None])
def test_an_lm_head_of_its_own_is_kept(declared: bool | None) -> None:
    matches = matched({**LLAMA, "tie_word_embeddings": declared}, "lm_head.weight")
    assert matches.names["lm_head.weight"][0] == "lm_head.weight"
    assert not matches.ties


def test_untied_without_an_lm_head_stays_missing() -> None:
    assert not matched(LLAMA, less=("lm_head.weight",)).ties


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_buffers_are_ignored(name: str) -> None:
    matches = matched(LLAMA, name)
    assert not matches.problems
    assert name not in matches.names
    assert name not in matches.left_out


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


def test_biases_of_the_mlp_are_left_out_unless_wanted() -> None:
    config = {**LLAMA, "mlp_bias": True}
    biases = {name for name in shapes(config) if ".mlp." in name and name.endswith(".bias")}
    assert biases
    assert matched(config).left_out.keys() == biases
    kept = matched(config, keep=frozenset({"mlp_bias"}))
    assert not kept.left_out
    assert biases <= kept.names.keys()


rows = st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 6, 8]))
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


@each_operation
@given(data=st.data(), case=rows, columns=st.sampled_from([(), (1,), (3,)]))
def test_operations_undo_and_are_undone(
    operation: str, data: st.DataObject, case: tuple[int, int], columns: tuple[int, ...]
) -> None:
    groups, period = case
    array = data.draw(hnp.arrays(np.int16, (groups * period, *columns)))
    pair, before = OPERATIONS[operation], array.copy()
    assert np.array_equal(pair.inverse(pair.forward(array, period), period), array)
    assert np.array_equal(pair.forward(pair.inverse(array, period), period), array)
    assert np.array_equal(array, before), "a mapped file must not be written to"


@each_operation
@given(data=st.data(), case=rows)
def test_operations_run_block_by_block(operation: str, data: st.DataObject, case: tuple[int, int]) -> None:
    groups, period = case
    array = np.arange(groups * period * 3).reshape(groups * period, 3)
    expected = OPERATIONS[operation].forward(array, period)
    region = data.draw(regions(array.shape))
    assert np.array_equal(operate(block(array), operation, period).read(region), expected[slices(region)])


@each_operation
@pytest.mark.parametrize("block_bytes", [1, 400, 10**6])
def test_operations_do_not_see_chunks(operation: str, block_bytes: int) -> None:
    family = find_family("gguf", "llama")
    assert family is not None
    config = {"vocab_size": 8, "embedding_length": 12, "block_count": 1, "attention.head_count": 6, "attention.head_count_kv": 6}
    config |= {"feed_forward_length": 4, "context_length": 9, "attention.layer_norm_rms_epsilon": 1e-5, "attention.key_length": 8}
    model = model_config(config, family, "llama", "file.gguf")
    array = np.random.default_rng(0).standard_normal((48, 12))
    row = next(row for row in family.rename.values() if row.operation == operation)
    matches = Matches({"s": ("t", row)}, {}, {}, {}, ())
    result = rename(read(held({"s": array}), block_bytes, 8), matches, model)
    assert np.array_equal(values(result["t"]), OPERATIONS[operation].forward(array, 8))


@given(rows)
def test_unpermute_rope_is_the_inverse_of_llama_cpp(case: tuple[int, int]) -> None:
    heads, head_size = case
    ours = OPERATIONS["unpermute_rope"].forward(np.arange(heads * head_size), head_size)
    for head in range(heads):
        for half in range(2):
            for i in range(head_size // 2):
                # llama.cpp puts frequency i's two rows side by side; Hugging Face keeps them half a head apart.
                assert ours[head * head_size + half * (head_size // 2) + i] == head * head_size + 2 * i + half
