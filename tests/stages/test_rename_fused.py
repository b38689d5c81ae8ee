"""rename: the rows of a fused source go each to one of the tensors that it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import dask.array as da
import numpy as np
from dask._task_spec import Task
from hypothesis import given
from hypothesis import strategies as st

from pipeline.model.model_config import ModelConfig
from pipeline.model.tables import find_family, layout
from pipeline.tensor.blocks import read_block
from pipeline.tensor.names import TensorName, split_name
from pipeline.tensor.placement import extent, slices, whole
from stages.rename import Matches, Renamed, match, rename
from tests.support.lazy import HeldBlock, held, texts, values
from tests.support.rank_oracle import model_of


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
