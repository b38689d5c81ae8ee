"""Where values come from: the pieces of every rank put its tensors together, for any model and any sizes that fit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from hypothesis import given

from stages.verify.roundtrip.matching import uncovered
from stages.verify.roundtrip.model_split import model_split, split
from stages.verify.roundtrip.origin import Origin, origins
from tests.support.examples import examples
from tests.support.rank_oracle import Arrays, Case, cases, oracle, sources

LOCAL = {
    "attention.qkv.q": "self_attn.q_proj",
    "attention.qkv.k": "self_attn.k_proj",
    "attention.qkv.v": "self_attn.v_proj",
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "mlp.router": "block_sparse_moe.gate",
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}
OUTSIDE = {"transformer.vocab_embedding": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
EXPERT = {"fc.up": "w3", "fc.gate": "w1", "proj": "w2"}


def hugging_face(given_: Arrays) -> Arrays:
    """The oracle's tensors by Hugging Face's names."""
    result = {}
    for name, values in given_.items():
        module, _, parameter = name.rpartition(".")
        if module in OUTSIDE:
            result[f"{OUTSIDE[module]}.{parameter}"] = values
            continue
        layer, local = module.removeprefix("transformer.layers.").split(".", 1)
        parts = local.split(".")
        if len(parts) > 2 and parts[2].isdigit():
            local = f"block_sparse_moe.experts.{parts[2]}.{EXPERT['.'.join([parts[1], *parts[3:]])]}"
        else:
            local = LOCAL[local]
        result[f"model.layers.{layer}.{local}.{parameter}"] = values
    return result


def config_of(case: Case) -> dict[str, Any]:
    model, sizes, embedding = case.sharding.model, case.sharding.parallelism, case.sharding.embedding
    return {
        "architecture": "MixtralForCausalLM" if model.num_experts else "LlamaForCausalLM",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_size": model.head_size,
        "use_parallel_embedding": embedding.parallel,
        "embedding_sharding_dim": embedding.dim,
        "moe": {"num_experts": model.num_experts},
        "mapping": {"tp_size": sizes.tp_size, "pp_size": sizes.pp_size, "moe_ep_size": sizes.moe_ep_size},
    }


def filled(piece: Origin, source: Arrays, into: np.ndarray) -> None:
    rows = into if piece.expert is None else into[piece.expert]
    if not piece.source:
        rows[slice(*piece.rows)] = 0
        return
    values = source[piece.source][slice(*piece.source_rows)]
    rows[slice(*piece.rows)] = values if piece.columns is None else values[:, slice(*piece.columns)]


@examples(60)
# A mixture of one expert is none to the loader.
@given(cases().filter(lambda case: not case.stacked and case.sharding.model.num_experts != 1))
def test_the_pieces_make_every_tensor_of_every_rank(case: Case) -> None:
    renamed = sources(case)
    source = hugging_face(renamed)
    config = config_of(case)
    cut = model_split(config)
    ranks = [oracle(case, renamed, number) for number in range(cut.tp * cut.pp)]
    pieces = origins(config, {name: values.shape for name, values in source.items()}, [rank.keys() for rank in ranks])
    made = [{name: np.full_like(values, -1) for name, values in rank.items()} for rank in ranks]
    held = defaultdict(list)
    for piece in pieces:
        filled(piece, source, made[piece.rank][piece.tensor])
        held[piece.source].append((piece.source_rows, piece.columns))
    for ours, theirs in zip(made, ranks, strict=True):
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, name)
    assert [name for name, values in source.items() if uncovered(values.shape, held[name])] == []


def test_a_tied_head_is_the_embedding() -> None:
    config = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 7,
        "hidden_size": 4,
        "num_hidden_layers": 0,
        "num_attention_heads": 2,
        "mapping": {"tp_size": 2},
    }
    shapes = {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,)}
    pieces = origins(config, shapes, [["lm_head.weight"]] * 2)
    assert pieces == [
        Origin(0, "lm_head.weight", (0, 4), "model.embed_tokens.weight", (0, 4)),
        Origin(1, "lm_head.weight", (0, 3), "model.embed_tokens.weight", (4, 7)),
        Origin(1, "lm_head.weight", (3, 4), ""),
    ]


def test_what_is_uncovered_is_said_by_rows_and_columns() -> None:
    assert uncovered((4, 6), [((0, 4), None)]) == ""
    assert uncovered((4, 6), [((0, 2), None), ((2, 4), (0, 3)), ((2, 4), (3, 6))]) == ""
    assert uncovered((4, 6), [((0, 2), None), ((3, 4), None)]) == "rows from 2"
    assert uncovered((4, 6), [((0, 4), (0, 3)), ((0, 3), (3, 6))]) == "rows from 3, columns 3 to 6"
    assert uncovered((4,), []) == "rows from 0"


def test_equal_parts_tile_a_length() -> None:
    assert [split(12, 3, n) for n in range(3)] == [(0, 4), (4, 8), (8, 12)]
