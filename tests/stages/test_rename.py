"""rename: a bijection on names, less what is ignored, plus ties; operations have inverses and run block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
import torch
from dask._task_spec import Task
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.model.family_rows import RenameRow
from pipeline.model.model_config import ModelConfig, model_config
from pipeline.model.operations import OPERATIONS
from pipeline.model.tables import Family, find_family, layout
from pipeline.tensor.blocks import read_block
from pipeline.tensor.names import TensorName, split_name, split_names
from pipeline.tensor.placement import extent, slices, whole
from stages.cast import cast
from stages.read import read
from stages.rename import Matches, Renamed, match, operate, rename
from tests.support.checkpoints import LLAMA, MIXTRAL, shapes
from tests.support.lazy import HeldBlock, block, held, texts, values
from tests.support.rank_oracle import model_of
from tests.support.strategies import regions

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
    once = pair.forward(array, period)
    if pair.inverse is None:
        assert np.allclose(pair.forward(once, period), once, rtol=1e-6)
    else:
        assert np.array_equal(pair.inverse(once, period), array)
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
    model = model_of(6, 6, 8, 12, 4, 8, 1)
    array = np.random.default_rng(0).standard_normal((48, 12))
    row = RenameRow(("t",), operation, "head_size")
    source, target = TensorName("s", "weight"), TensorName("t", "weight")
    matches = Matches({target: Renamed(source, row)}, {}, {}, {}, ())
    result = rename(read(held({source: array}), block_bytes, 8), matches, model)
    assert np.array_equal(values(result[target]), OPERATIONS[operation].forward(array, 8))


@given(rows)
def test_unpermute_rope_is_the_inverse_of_llama_cpp(case: tuple[int, int]) -> None:
    heads, head_size = case
    ours = OPERATIONS["unpermute_rope"].forward(np.arange(heads * head_size), head_size)
    for head in range(heads):
        for half in range(2):
            for i in range(head_size // 2):
                # llama.cpp puts frequency i's two rows side by side; Hugging Face keeps them half a head apart.
                assert ours[head * head_size + half * (head_size // 2) + i] == head * head_size + 2 * i + half


# Fused sources: one tensor whose rows are those of several.


@dataclass(frozen=True)
class Fused:
    """A fused source: its name, its shape, and what each of the modules that it is made of must be, by the end of its name."""

    family: str
    end: str
    shape: tuple[int, ...]
    parts: Callable[[np.ndarray], dict[str, np.ndarray]]
    model: ModelConfig

    @property
    def source(self) -> TensorName:
        return split_name(f"model.layers.0.{self.end}")


def interleaved(model: ModelConfig, parameter: str) -> Fused:
    """InternLM2's wqkv: each kv head's queries, then its key, then its value."""
    kv_heads, size = model.num_key_value_heads, model.head_size
    shape = (model.q_size + 2 * model.kv_size, model.hidden_size)[: 1 if parameter == "bias" else 2]

    def parts(values: np.ndarray) -> dict[str, np.ndarray]:
        heads = values.reshape(kv_heads, -1, size, *values.shape[1:])
        cut = {"q": heads[:, :-2], "k": heads[:, -2:-1], "v": heads[:, -1:]}
        return {f"attention.qkv.{part}": group.reshape(-1, *values.shape[1:]) for part, group in cut.items()}

    return Fused("InternLM2ForCausalLM", f"attention.wqkv.{parameter}", shape, parts, model)


def one_after_the_other(model: ModelConfig, parameter: str) -> Fused:
    """Phi-3's qkv_proj: all queries, then all keys, then all values."""
    shape = (model.q_size + 2 * model.kv_size, model.hidden_size)[: 1 if parameter == "bias" else 2]

    def parts(values: np.ndarray) -> dict[str, np.ndarray]:
        cut = np.split(values, [model.q_size, model.q_size + model.kv_size])
        return {f"attention.qkv.{part}": rows for part, rows in zip("qkv", cut, strict=True)}

    return Fused("Phi3ForCausalLM", f"self_attn.qkv_proj.{parameter}", shape, parts, model)


def halves(model: ModelConfig, parameter: str) -> Fused:  # noqa: ARG001
    """Phi-3's gate_up_proj: what is activated, then its factor."""
    shape = (2 * model.intermediate_size, model.hidden_size)

    def parts(values: np.ndarray) -> dict[str, np.ndarray]:
        gate, up = np.split(values, 2)
        return {"mlp.fc.gate": gate, "mlp.fc.up": up}

    return Fused("Phi3ForCausalLM", "mlp.gate_up_proj.weight", shape, parts, model)


def stacked(model: ModelConfig, parameter: str) -> Fused:  # noqa: ARG001
    """transformers 5's experts: the halves of every expert."""
    shape = (model.num_experts, 2 * model.intermediate_size, model.hidden_size)

    def parts(values: np.ndarray) -> dict[str, np.ndarray]:
        gate, up = np.split(values, 2, axis=1)
        return {"mlp.fc.gate": gate, "mlp.fc.up": up}

    return Fused("MixtralForCausalLM", "mlp.experts.gate_up_proj.weight", shape, parts, model)


@st.composite
def fused_sources(draw: st.DrawFn) -> Fused:
    small = st.integers(1, 4)
    kv_heads = draw(small)
    model = model_of(kv_heads * draw(small), kv_heads, 2 * draw(st.integers(1, 3)), draw(small), draw(small), 8, 1)
    model = replace(model, num_experts=draw(small))
    kind = draw(st.sampled_from([interleaved, one_after_the_other, halves, stacked]))
    return kind(model, draw(st.sampled_from(["weight", "bias"])))


@st.composite
def chunkings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Chunk edges anywhere, on every axis."""
    chunks = []
    for length in shape:
        edges = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
        chunks.append(tuple(int(n) for n in np.diff([0, *edges, length])))
    return tuple(chunks)


def split(fused: Fused) -> dict[TensorName, Renamed]:
    """Where each part of a fused source comes from, by its name less its layer."""
    family = find_family("huggingface", fused.family)
    assert family is not None
    matches = match([fused.source], family, layout(family.layout), fused.model, frozenset())
    assert not matches.problems
    assert {renamed.source for renamed in matches.names.values()} == {fused.source}
    return {TensorName(module.removeprefix("transformer.layers.0."), kind): row for (module, kind), row in matches.names.items()}


def chunked(array: np.ndarray, chunks: tuple[tuple[int, ...], ...]) -> da.Array:
    """A lazy array of blocks, cut where `chunks` says."""
    graph = {}
    for index in np.ndindex(*map(len, chunks)):
        region = tuple((sum(axis[:i]), sum(axis[: i + 1])) for axis, i in zip(chunks, index, strict=True))
        graph[("chunked", *index)] = Task(("chunked", *index), HeldBlock, array[slices(region)], whole(extent(region)))
    return da.Array(graph, "chunked", chunks=chunks, meta=np.empty((0,) * array.ndim, dtype=array.dtype))


def distinct(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


@given(fused_sources())
def test_each_row_of_a_fused_source_belongs_to_one_part(fused: Fused) -> None:
    parts = split(fused).values()
    total = {part.total for part in parts}
    assert total == {fused.shape[next(iter(parts)).axis]}
    taken = sorted(rows for part in parts for rows in part.rows)
    assert [start for start, _ in taken] == [0, *(stop for _, stop in taken[:-1])]
    assert taken[-1][1] == total.pop()
    assert all(list(part.rows) == sorted(part.rows) for part in parts)
    assert sum(part.share for part in parts) == 1


@given(data=st.data(), fused=fused_sources())
def test_the_parts_of_a_fused_source_joined_are_the_source(data: st.DataObject, fused: Fused) -> None:
    source, parts = distinct(fused.shape), split(fused)
    tensors = {fused.source: chunked(source, data.draw(chunkings(fused.shape)))}
    result = rename(tensors, Matches(parts, {}, {}, {}, ()), fused.model)
    joined = np.full_like(source, -1)
    for name, part in parts.items():
        before = (slice(None),) * part.axis
        rows = np.concatenate([np.arange(*interval) for interval in part.rows])
        joined[(*before, rows)] = values(result[name])
    assert np.array_equal(joined, source)


@given(data=st.data(), fused=fused_sources())
def test_a_part_has_the_rows_that_are_its_own(data: st.DataObject, fused: Fused) -> None:
    source, parts = distinct(fused.shape), split(fused)
    tensors = {fused.source: chunked(source, data.draw(chunkings(fused.shape)))}
    result = rename(tensors, Matches(parts, {}, {}, {}, ()), fused.model)
    expected = {TensorName(module, fused.source.parameter): rows for module, rows in fused.parts(source).items()}
    assert result.keys() == expected.keys()
    for name, array in result.items():
        assert array.shape == expected[name].shape
        assert np.array_equal(values(array), expected[name])
        # And block by block, as a task reads them.
        for index in np.ndindex(*array.numblocks):
            place = tuple(slice(sum(axis[:i]), sum(axis[: i + 1])) for axis, i in zip(array.chunks, index, strict=True))
            assert np.array_equal(np.asarray(read_block(array, index)), expected[name][place])


def test_a_fused_source_is_read_at_the_size_of_its_parts() -> None:
    """What a part is made of is its share of the source, not all of it."""
    fused = interleaved(model_of(8, 2, 4, 8, 8, 8, 1), "weight")
    matches = Matches(split(fused), {}, {}, {}, ())
    sizes = {name: matches.source_bytes(name, held({fused.source: np.zeros(fused.shape)})) for name in matches.names}
    expected = {"attention.qkv.q.weight": 32 * 8 * 8, "attention.qkv.k.weight": 8 * 8 * 8, "attention.qkv.v.weight": 8 * 8 * 8}
    assert texts(sizes) == expected


# Norms plus one.

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS = {2: torch.int16, 4: torch.int32}


def samples(dtype: np.dtype) -> np.ndarray:
    """Every value of a 16-bit type; of float32, the same with other low bits."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if dtype.itemsize == 2:
        return patterns.view(dtype)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    return ((patterns.astype(np.uint32) << 16)[:, None] | low).ravel().view(dtype)


def plus_one(array: np.ndarray, wanted: str) -> np.ndarray:
    """torch's: bfloat16 is widened first, float16 is not; one cast at the end."""
    kind = array.dtype.name
    signed = torch.from_numpy(array.view(f"i{array.dtype.itemsize}").copy()).view(TORCH[kind])
    result = ((signed.float() if kind == "bfloat16" else signed) + 1.0).to(TORCH[wanted])
    return result.view(INTEGERS[result.itemsize]).numpy()


@pytest.mark.parametrize("wanted", TORCH)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=lambda dtype: dtype.name)
def test_a_norm_plus_one_is_rounded_where_torch_rounds_it(dtype: np.dtype, wanted: str) -> None:
    given = samples(dtype)
    source, name = TensorName("s", "weight"), TensorName("transformer.ln_f", "weight")
    matches = Matches({name: Renamed(source, RenameRow((name.module,), "add_one"))}, {}, {}, {}, ())
    renamed = rename(read(held({source: given}), 1 << 14, 1), matches, model_of(1, 1, 2, 2, 2, 2, 1))
    assert renamed[name].dtype == (np.float32 if dtype == BFLOAT16 else dtype)
    with np.errstate(invalid="ignore"):  # NaNs
        ours = values(cast(renamed, layout("gemma"), wanted)[name])
        missing = np.isnan(given.astype(np.float64))
    assert ours.dtype.name == wanted
    assert np.array_equal(np.isnan(ours.astype(np.float64)), missing)
    theirs = plus_one(given, wanted)
    assert np.array_equal(ours.view(theirs.dtype)[~missing], theirs[~missing])


def test_a_half_is_added_to_as_a_half() -> None:
    """Its sum is rounded twice on the way to bfloat16, which is seen in thousands of values."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    twice = OPERATIONS["add_one"].forward(halves, 1).astype(BFLOAT16)
    once = (halves.astype(np.float32) + 1).astype(BFLOAT16)
    assert np.array_equal(twice.view(np.int16), plus_one(halves, "bfloat16"))
    assert np.count_nonzero(twice != once) > 1000


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=lambda dtype: dtype.name)
def test_subtracting_undoes_adding_but_for_what_was_rounded(dtype: np.dtype) -> None:
    pair, given = OPERATIONS["add_one"], samples(dtype)
    with np.errstate(invalid="ignore"):
        size = np.abs(given.astype(np.float64))
    given, size = given[size < 2**15], size[size < 2**15]
    back = pair.inverse(pair.forward(given, 1), 1)
    assert back.dtype == pair.dtype(dtype)
    error = np.abs(back.astype(np.float64) - given.astype(np.float64))
    assert np.all(error <= (1 + size) * float(np.finfo(back.dtype).eps))
    # float32 holds a bfloat16 plus one as it is, but for tiny weights.
    assert dtype != BFLOAT16 or np.all(error[size > 2**-15] == 0)
