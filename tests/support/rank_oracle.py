"""What every rank must hold, in plain NumPy straight from the checkpoint format (docs/format/checkpoint.md, section 2), and models
to ask it for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from pipeline.model.model_config import ModelConfig
from pipeline.model.parallelism import Parallelism
from pipeline.model.tables import layout
from stages.shard import Embedding, Sharding

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model and the sizes that it is cut to; `stacked`: its experts come as one tensor."""

    sharding: Sharding
    stacked: bool = False


def model_of(
    heads: int, kv_heads: int, head_size: int, hidden: int, inner: int, vocab: int, layers: int, **more: int
) -> ModelConfig:
    return ModelConfig("M", vocab, hidden, layers, heads, kv_heads, inner, 64, "silu", 1e-5, 1e4, head_size=head_size, **more)


def sharding_of(model: ModelConfig, parallelism: Parallelism, embedding: Embedding | None = None) -> Sharding:
    return Sharding(layout("moe_decoder" if model.num_experts else "decoder"), model, parallelism, embedding or Embedding())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Models and sizes that fit: fewer kv heads than ranks, odd vocabularies, layers that the stages do not divide."""
    moe_tp, moe_ep = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (4, 1), (1, 4), (6, 1), (2, 3), (8, 1), (2, 4)]))
    tp = moe_tp * moe_ep
    kv_heads = draw(st.sampled_from([1, *(k for k in range(2, tp) if tp % k == 0), tp, 2 * tp]))
    heads = math.lcm(tp, kv_heads) * draw(st.integers(1, 2))
    embedding = Embedding(draw(st.booleans()), draw(st.integers(0, 1)))
    hidden = draw(st.integers(1, 3)) * (tp if embedding.parallel and embedding.dim == 1 else 1)
    experts = moe_ep * draw(st.integers(1, 2)) if moe_ep > 1 or draw(st.booleans()) else 0
    inner = draw(st.integers(1, 3)) * (moe_tp if experts else tp)
    layers = draw(st.integers(1, 5))
    model = model_of(heads, kv_heads, draw(st.sampled_from([2, 6])), hidden, inner, draw(st.integers(1, 30)), layers)
    model = replace(model, attn_bias=draw(st.booleans()), mlp_bias=not experts and draw(st.booleans()), num_experts=experts)
    parallelism = Parallelism(tp, draw(st.integers(1, layers)), 1, moe_tp, moe_ep)
    return Case(sharding_of(model, parallelism, embedding), draw(st.booleans()))


@st.composite
def aligned_cases(draw: st.DrawFn, small: bool = False) -> Case:
    """Models whose matrices are whole tiles of 64 for each rank, on both axes, as quantized ones must be; few kv heads."""
    moe_tp, moe_ep = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]))
    tp, most = moe_tp * moe_ep, 1 if small else 2
    kv_heads = draw(st.sampled_from([1, tp, 2 * tp][: most + 1]))
    experts = moe_ep * draw(st.integers(1, most)) if moe_ep > 1 or draw(st.booleans()) else 0
    inner = 64 * draw(st.integers(1, most)) * (moe_tp if experts else tp)
    layers = draw(st.integers(1, most))
    # Of heads of 32, a rank has two at least.
    heads, head_size = (2 * tp, 32) if draw(st.booleans()) else (tp, 64)
    heads = math.lcm(heads, kv_heads) * draw(st.integers(1, most))
    model = model_of(heads, kv_heads, head_size, 64 * tp * draw(st.integers(1, most)), inner, draw(st.integers(1, 30)), layers)
    model = replace(model, attn_bias=draw(st.booleans()), mlp_bias=not experts and draw(st.booleans()), num_experts=experts)
    parallelism = Parallelism(tp, draw(st.integers(1, layers)), 1, moe_tp, moe_ep)
    return Case(sharding_of(model, parallelism, Embedding(draw(st.booleans()))), draw(st.booleans()))


def sources(case: Case) -> Arrays:
    """Every renamed tensor of a model, with values that are all different, none of them 0."""
    model, count = case.sharding.model, 1
    result: Arrays = {}

    def add(name: str, *shape: int) -> None:
        nonlocal count
        result[name] = np.arange(count, count + math.prod(shape)).reshape(shape)
        count += math.prod(shape)

    hidden, inner, vocab, experts = model.hidden_size, model.intermediate_size, model.vocab_size, model.num_experts
    q, kv = model.num_attention_heads * model.head_size, model.num_key_value_heads * model.head_size
    for name in ("transformer.vocab_embedding", "lm_head"):
        add(f"{name}.weight", vocab, hidden)
    add("transformer.ln_f.weight", hidden)
    for n in range(model.num_hidden_layers):
        layer = f"transformer.layers.{n}."
        add(f"{layer}input_layernorm.weight", hidden)
        add(f"{layer}post_layernorm.weight", hidden)
        for name, rows, columns in (("qkv.q", q, hidden), ("qkv.k", kv, hidden), ("qkv.v", kv, hidden), ("dense", hidden, q)):
            add(f"{layer}attention.{name}.weight", rows, columns)
            if model.attn_bias:
                add(f"{layer}attention.{name}.bias", rows)
        if experts:
            add(f"{layer}mlp.router.weight", experts, hidden)
            for name, part, rows, columns in (
                ("fc", ".up", inner, hidden),
                ("fc", ".gate", inner, hidden),
                ("proj", "", hidden, inner),
            ):
                if case.stacked:
                    add(f"{layer}mlp.{name}{part}.weight", experts, rows, columns)
                for e in range(0 if case.stacked else experts):
                    add(f"{layer}mlp.{name}.{e}{part}.weight", rows, columns)
            continue
        for name, rows, columns in (("fc", inner, hidden), ("gate", inner, hidden), ("proj", hidden, inner)):
            add(f"{layer}mlp.{name}.weight", rows, columns)
            if model.mlp_bias:
                add(f"{layer}mlp.{name}.bias", rows)
    return result


def oracle(case: Case, given: Arrays, number: int) -> Arrays:
    """The tensors of one rank, by the checkpoint format (docs/format/checkpoint.md, section 2) and nothing of headrace's."""
    model, sizes, embedding = case.sharding.model, case.sharding.parallelism, case.sharding.embedding
    t, stages, ep, mtp = sizes.tp_size, sizes.pp_size, sizes.moe_ep_size, sizes.moe_tp_size
    r, stage = number % t, number // t
    result: Arrays = {}

    def rows(array: np.ndarray, n: int = t, index: int = r) -> np.ndarray:
        return np.split(array, n, axis=0)[index]

    def columns(array: np.ndarray, n: int = t, index: int = r) -> np.ndarray:
        return np.split(array, n, axis=-1)[index]

    def padded(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.zeros((-len(array) % t, array.shape[1]), dtype=array.dtype)])

    def kv(array: np.ndarray) -> np.ndarray:
        heads = array.reshape(model.num_key_value_heads, model.head_size, *array.shape[1:])
        held = heads[r * len(heads) // t][None] if len(heads) < t else rows(heads)
        return held.reshape(-1, *array.shape[1:])

    if stage == 0:
        table = given["transformer.vocab_embedding.weight"]
        if embedding.parallel:
            table = rows(padded(table)) if embedding.dim == 0 else columns(table)
        result["transformer.vocab_embedding.weight"] = table
    if stage == stages - 1:
        result["transformer.ln_f.weight"] = given["transformer.ln_f.weight"]
        result["lm_head.weight"] = rows(padded(given["lm_head.weight"]))
    mine = np.array_split(np.arange(model.num_hidden_layers), stages)[stage]
    for local, n in enumerate(mine):
        theirs, ours = f"transformer.layers.{n}.", f"transformer.layers.{local}."
        for name in ("input_layernorm.weight", "post_layernorm.weight"):
            result[ours + name] = given[theirs + name]
        for kind in ("weight", "bias") if model.attn_bias else ("weight",):
            q, k, v = (given[f"{theirs}attention.qkv.{part}.{kind}"] for part in "qkv")
            result[f"{ours}attention.qkv.{kind}"] = np.concatenate([rows(q), kv(k), kv(v)])
        result[f"{ours}attention.dense.weight"] = columns(given[f"{theirs}attention.dense.weight"])
        if model.attn_bias:
            result[f"{ours}attention.dense.bias"] = given[f"{theirs}attention.dense.bias"]
        if model.num_experts:
            result[f"{ours}mlp.router.weight"] = given[f"{theirs}mlp.router.weight"]

            def expert(name: str, e: int, part: str = "", layer: str = theirs) -> np.ndarray:
                if case.stacked:
                    return given[f"{layer}mlp.{name}{part}.weight"][e]
                return given[f"{layer}mlp.{name}.{e}{part}.weight"]

            share = model.num_experts // ep
            block = range(r % ep * share, (r % ep + 1) * share)
            up, gate = ([rows(expert("fc", e, part), mtp, r // ep) for e in block] for part in (".up", ".gate"))
            result[f"{ours}mlp.fc.weight"] = np.stack([np.concatenate(pair) for pair in zip(up, gate, strict=True)])
            result[f"{ours}mlp.proj.weight"] = np.stack([columns(expert("proj", e), mtp, r // ep) for e in block])
            continue
        for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
            for name in ("fc", "gate"):
                result[f"{ours}mlp.{name}.{kind}"] = rows(given[f"{theirs}mlp.{name}.{kind}"])
        result[f"{ours}mlp.proj.weight"] = columns(given[f"{theirs}mlp.proj.weight"])
        if model.mlp_bias:
            result[f"{ours}mlp.proj.bias"] = given[f"{theirs}mlp.proj.bias"]
    return result
