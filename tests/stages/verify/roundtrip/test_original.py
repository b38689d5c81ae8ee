"""A source's weights by Hugging Face's names are those of the model that it was written from; only what is asked for is read."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.placement import Region, size
from pipeline.tensor.tensors import Block, LazyTensor, Source
from stages.read import open_model, open_source
from stages.verify.roundtrip.original import Original
from stages.verify.roundtrip.original.numbers import Numbers, StoredNumbers, Ungrouped, Unpermuted
from stages.verify.values import same_bits, to_float32
from tests.end_to_end.test_family_forward import CASES, build
from tests.support import checkpoints, gguf_files, meta_files
from tests.support.lazy import Held
from tests.support.own_names import exaone, internlm2

BF16: dict[str, Any] = {**checkpoints.LLAMA, "torch_dtype": "bfloat16", "num_hidden_layers": 2}
BIASED = {**BF16, "attention_bias": True, "vocab_size": 90}
TIED = {**BF16, "tie_word_embeddings": True}
MIXTRAL: dict[str, Any] = {**checkpoints.MIXTRAL, "torch_dtype": "bfloat16", "num_hidden_layers": 2}


def whole(original: Original, name: str) -> np.ndarray:
    return original.rows(name, 0, original.shape(name)[0])


def same(original: Original, expected: Mapping[str, np.ndarray]) -> None:
    """The same names, shapes, types and bits."""
    assert sorted(original.names()) == sorted(expected)
    for name, array in expected.items():
        assert original.shape(name) == array.shape, name
        assert original.dtype(name) == array.dtype == whole(original, name).dtype, name
        assert same_bits(whole(original, name), array), name


@pytest.mark.parametrize("config", [BF16, BIASED, TIED, MIXTRAL], ids=["llama", "biases", "tied", "mixtral"])
def test_dense_weights_are_those_of_the_files(config: dict[str, Any], tmp_path: Path) -> None:
    expected = checkpoints.write(tmp_path, config, shards=2)
    original = Original(open_source(tmp_path))
    same(original, expected)
    assert all(original.exact(name) for name in original.names())
    assert original.config == config


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_meta_weights_have_their_rows_put_back(parts: int, vocabulary: bool, tmp_path: Path) -> None:
    config = {**BF16, "vocab_size": 90}
    expected = checkpoints.values(config)
    meta_files.write(tmp_path, config, expected, parts, vocabulary=vocabulary)
    same(Original(open_source(tmp_path)), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("config", [BF16, BIASED, TIED, MIXTRAL], ids=["llama", "biases", "tied", "mixtral"])
def test_gguf_weights_have_their_rows_put_back(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    source = checkpoints.values(config)
    gguf_files.write(tmp_path / "model.gguf", config, source, kind)
    original = Original(open_source(tmp_path / "model.gguf"))
    assert sorted(original.names()) == sorted(source)
    for name, array in source.items():
        matrix = array.ndim > 1 and "block_sparse_moe.gate" not in name
        type_ = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        # Rows are packed one by one, so that it is all the same whether they are put in order before or after.
        wanted = gguf.quants.dequantize(gguf.quants.quantize(array.astype(np.float32), type_), type_)
        assert np.array_equal(to_float32(whole(original, name)), wanted), name
        assert original.exact(name) == (type_.name in ("F32", "F16", "BF16"))
        assert original.shape(name) == array.shape


@pytest.mark.parametrize("config", [BF16, BIASED, TIED], ids=["llama", "biases", "tied"])
@pytest.mark.parametrize("renamed", [internlm2, exaone])
def test_families_with_names_of_their_own_are_llama(config: dict[str, Any], renamed: Any, tmp_path: Path) -> None:
    expected = checkpoints.values(config)
    checkpoints.save(tmp_path, *renamed(config, expected))
    original = Original(open_source(tmp_path))
    same(original, expected)
    kept = {key: value for key, value in original.config.items() if key in config}
    assert kept == {key: value for key, value in config.items() if key in kept}
    assert {"rms_norm_eps", "num_hidden_layers", "hidden_act", "architectures", "tie_word_embeddings"} <= kept.keys()


@pytest.mark.parametrize("name", [name for name in CASES if name == "mixtral" or "moe" in name])
def test_stacks_of_experts_are_the_experts_of_the_saved_model(name: str, tmp_path: Path) -> None:
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    saved = Original(open_source(tmp_path))
    source = open_model(model)
    assert any(len(tensor.shape) == 3 for tensor in source.tensors.values())
    same(Original(source), {name: whole(saved, name) for name in saved.names()})


def test_what_is_computed_is_no_weight_and_what_is_unknown_keeps_its_name(tmp_path: Path) -> None:
    tensors = checkpoints.values(BF16)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "model.surprise": np.ones(4, np.float32)}
    checkpoints.save(tmp_path, BF16, {**tensors, **extra})
    names = Original(open_source(tmp_path)).names()
    assert set(names) - tensors.keys() == {"model.surprise"}


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = checkpoints.values(MIXTRAL)
    again = {"model.layers.1.mlp.gate.weight": tensors["model.layers.1.block_sparse_moe.gate.weight"].copy()}
    checkpoints.save(tmp_path, MIXTRAL, {**tensors, **again})
    with pytest.raises(BadInput, match=r"model\.layers\.1\.(mlp|block_sparse_moe)\.gate\.weight: found"):
        Original(open_source(tmp_path))


def test_a_size_that_a_container_does_not_say_is_refused(tmp_path: Path) -> None:
    meta_files.write(tmp_path, BF16, checkpoints.values(BF16))
    source = open_source(tmp_path)
    config = {key: value for key, value in source.config.items() if key != "n_heads"}
    with pytest.raises(BadInput, match=r"params\.json: n_heads: found nothing"):
        Original(dataclasses.replace(source, config=config))


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, BF16)
    original = Original(open_source(tmp_path))
    assert original.rows("model.norm.weight", 64, 64).shape == (0,)
    assert original.rows("lm_head.weight", 0, 0).shape == (0, 64)
    for start, stop in [(0, 65), (-1, 3), (5, 4)]:
        with pytest.raises(IndexError, match=r"model\.norm\.weight: rows"):
            original.rows("model.norm.weight", start, stop)


def test_an_original_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    meta_files.write(tmp_path, BF16, checkpoints.values(BF16))
    original = Original(open_source(tmp_path))
    sent = pickle.loads(pickle.dumps(original))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(whole(sent, name), whole(original, name))


# Only what is asked for is read


class Counted:
    """A tensor that counts the elements that are read of it."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor, self.elements = tensor, 0
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def block(self, region: Region) -> Block:
        self.elements += size(region)
        return self.tensor.block(region)


def counted(source: Source) -> Source:
    return dataclasses.replace(source, tensors={name: Counted(tensor) for name, tensor in source.tensors.items()})


def rows_read(source: Source) -> dict[str, float]:
    """How many rows of each tensor have been read since the last time, where any have been."""
    result = {}
    for name, tensor in source.tensors.items():
        assert isinstance(tensor, Counted)
        if tensor.elements:
            result[name] = tensor.elements / np.prod(tensor.shape[1:])
        tensor.elements = 0
    return result


def test_dense_rows_alone_are_read(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, BF16)
    source = counted(open_source(tmp_path))
    original = Original(source)
    assert not rows_read(source)
    original.rows("lm_head.weight", 20, 30)
    assert rows_read(source) == {"lm_head.weight": 10}


def test_of_interleaved_halves_no_more_than_twice_the_rows_are_read(tmp_path: Path) -> None:
    config = {**BF16, "num_attention_heads": 2, "num_key_value_heads": 2}  # 32 rows a head
    meta_files.write(tmp_path, config, checkpoints.values(config))
    source = counted(open_source(tmp_path))
    original = Original(source)
    original.rows("model.layers.1.self_attn.q_proj.weight", 34, 44)
    assert rows_read(source) == {"layers.1.attention.wq.weight": 19}
    original.rows("model.layers.1.self_attn.q_proj.weight", 0, 64)
    assert rows_read(source) == {"layers.1.attention.wq.weight": 64}


def test_of_a_fused_tensor_a_part_is_read(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, *internlm2(BF16, checkpoints.values(BF16)))
    source = counted(open_source(tmp_path))
    original = Original(source)
    original.rows("model.layers.0.self_attn.k_proj.weight", 0, 32)
    assert rows_read(source) == {"model.layers.0.attention.wqkv.weight": 32}
    original.rows("model.layers.0.self_attn.q_proj.weight", 10, 20)
    assert rows_read(source) == {"model.layers.0.attention.wqkv.weight": 10}


def test_of_a_stack_one_expert_is_read(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", MIXTRAL, checkpoints.values(MIXTRAL), "Q8_0")
    source = counted(open_source(tmp_path / "model.gguf"))
    original = Original(source)
    original.rows("model.layers.1.block_sparse_moe.experts.3.w3.weight", 50, 60)
    (name,) = rows_read(source).keys()
    assert name == "blk.1.ffn_up_exps.gguf_Q8_0"
    original.rows("model.layers.1.block_sparse_moe.experts.3.w3.weight", 50, 60)
    assert rows_read(source)[name] * 160 == 10  # of 4 experts' 160 rows


# Any rows are those rows of the whole

ROWS = np.arange(96 * 3, dtype=np.float32).reshape(96, 3)
VIEWS: dict[str, Numbers] = {
    "stored": StoredNumbers(Held(ROWS)),
    "part of a stack": StoredNumbers(Held(ROWS.reshape(4, 24, 3))).part(2, 5, 17),
    "halves": Unpermuted(StoredNumbers(Held(ROWS)), 12),
    "queries": Ungrouped(StoredNumbers(Held(ROWS)), "q", 3, 8),
    "keys": Ungrouped(StoredNumbers(Held(ROWS)), "k", 3, 8),
    "values": Ungrouped(StoredNumbers(Held(ROWS)), "v", 3, 8),
}


@given(name=st.sampled_from(sorted(VIEWS)), data=st.data())
def test_any_rows_are_those_of_the_whole(name: str, data: st.DataObject) -> None:
    view = VIEWS[name]
    start = data.draw(st.integers(0, view.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, view.shape[0]))
    assert np.array_equal(view.rows(start, stop), view.rows(0, view.shape[0])[start:stop])


def test_the_parts_of_a_fused_tensor_have_each_row_once() -> None:
    parts = [VIEWS[name].rows(0, VIEWS[name].shape[0]) for name in ("queries", "keys", "values")]
    assert sorted(np.concatenate(parts)[:, 0].tolist()) == ROWS[:, 0].tolist()
