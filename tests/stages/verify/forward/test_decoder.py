"""How a decoder reads: a block of a weight at a time, the rows and experts that tokens ask for, once where it may keep them; and
step by step what it computes all at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInput
from pipeline.tensor.checkpoint import Checkpoint
from stages.read.ranks import open_checkpoint
from stages.verify.forward.attention import KeyValueCache
from stages.verify.forward.decoder import Decoder
from stages.verify.matrices import Matrix
from tests.end_to_end.test_family_forward import CASES, SIZES, TOLERANCE, WANTED, build, difference, ranks_of
from tests.support.examples import examples

Ranks = Callable[[str, str], Checkpoint]
TOKENS = torch.randint(SIZES["vocab_size"], (20,), generator=torch.Generator().manual_seed(4))
HIDDEN = SIZES["hidden_size"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """A family's model, converted to a target when it is first asked for."""
    made: dict[str, Path] = {}
    done: dict[tuple[str, str], Checkpoint] = {}

    def get(name: str, target: str) -> Checkpoint:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(CASES[name]).save_pretrained(made[name] / "model")
        if (name, target) not in done:
            done[name, target] = open_checkpoint(ranks_of(made[name] / "model", made[name] / target, target))
        return done[name, target]

    return get


class Reads:
    """Which rows of matrices were read: how often each row, and each block, [rows, in], in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[tuple[int, int]] = []
        self.experts: Counter[tuple[str, int]] = Counter()
        whole = Matrix.rows

        def rows(matrix: Matrix, start: int, stop: int) -> np.ndarray:
            result = whole(matrix, start, stop)
            self.blocks.append((len(result), result.shape[1]))
            if matrix.expert is not None:
                self.experts[matrix.tensors["weight"].path, matrix.expert] += 1
            return result

        monkeypatch.setattr(Matrix, "rows", rows)


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_any_size_give_the_same(name: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ranks(name, WANTED[name][-1])
    whole = Decoder(checkpoint).logits(TOKENS)
    reads = Reads(monkeypatch)
    for rows in (1, 5):
        limit = 4 * HIDDEN * rows
        assert difference(Decoder(checkpoint, block_bytes=limit).logits(TOKENS), whole) < TOLERANCE
        assert reads.blocks
        # A row wider than the limit is one block.
        assert all(4 * count * width <= limit or count == 1 for count, width in reads.blocks)
        reads.blocks.clear()


@pytest.mark.parametrize("name", CASES)
def test_step_by_step_is_all_at_once(name: str, ranks: Ranks) -> None:
    """Also where a sequence grows past long rope's trained length, and past a window."""
    decoder = Decoder(ranks(name, WANTED[name][0]))
    cache, done = KeyValueCache(), 0
    for count in (3, 1, 1, 8, 1, 1, 1, 1, 3):
        new = TOKENS[done : done + count]
        done += count
        assert difference(decoder.step(new, cache), decoder.logits(TOKENS[:done])[-count:]) < TOLERANCE
        assert cache.tokens.equal(TOKENS[:done])
    assert done == len(TOKENS)


@examples(20)
@given(cuts=st.sets(st.integers(1, len(TOKENS) - 1), max_size=6), block=st.integers(2_000, 50_000))
def test_wherever_a_sequence_is_cut(cuts: set[int], block: int, ranks: Ranks) -> None:
    checkpoint = ranks("qwen3", "tp4")
    decoder, cache = Decoder(checkpoint, block_bytes=block), KeyValueCache()
    bounds = [0, *sorted(cuts), len(TOKENS)]
    parts = [decoder.step(TOKENS[a:b], cache) for a, b in itertools.pairwise(bounds)]
    assert difference(torch.cat(parts), Decoder(checkpoint).logits(TOKENS)) < TOLERANCE


def test_the_last_rows_alone(ranks: Ranks) -> None:
    decoder = Decoder(ranks("llama", "rows"))
    some = decoder.step(TOKENS, KeyValueCache(), last=2)
    assert some.shape == (2, SIZES["vocab_size"])
    assert difference(some, decoder.logits(TOKENS)[-2:]) < TOLERANCE


def test_what_is_kept_is_read_once(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ranks("llama", "tp4pp2")
    whole = Decoder(checkpoint).logits(TOKENS)
    reads = Reads(monkeypatch)
    decoder, cache = Decoder(checkpoint, cache_bytes=1 << 30), KeyValueCache()
    assert difference(decoder.step(TOKENS[:-1], cache)[-1], whole[-2]) < TOLERANCE
    reads.blocks.clear()
    assert difference(decoder.step(TOKENS[-1:], cache), whole[-1:]) < TOLERANCE
    assert reads.blocks == [(1, HIDDEN)], "the new token's embedding"


def test_no_more_is_kept_than_was_asked_for(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ranks("mixtral", "tp4")
    plain = Reads(monkeypatch)
    Decoder(checkpoint, block_bytes=4 * HIDDEN).logits(TOKENS)
    everything = sum(4 * count * width for count, width in plain.blocks)
    limit = everything // 3
    decoder = Decoder(checkpoint, block_bytes=4 * HIDDEN, cache_bytes=limit)
    first = decoder.logits(TOKENS)
    plain.blocks.clear()
    assert decoder.logits(TOKENS).equal(first)
    again = sum(4 * count * width for count, width in plain.blocks)
    assert everything - limit <= again < everything - limit // 2


def test_embeddings_are_read_for_the_tokens_that_there_are(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(ranks("llama", "tp1"), cache_bytes=1 << 30)
    decoder.logits(TOKENS)
    reads = Reads(monkeypatch)
    decoder.logits(torch.tensor([7, 50, 7, 7, 98, 50]))
    assert reads.blocks == [(1, HIDDEN)] * 3


@pytest.mark.parametrize("target", ["tp4", "ep2", "tp4ep2"])
def test_experts_without_tokens_are_not_read(target: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ranks("mixtral", target)
    mapping = checkpoint.config["mapping"]
    reads = Reads(monkeypatch)
    decoder = Decoder(checkpoint)
    decoder.logits(TOKENS[:1])
    # One token goes to two experts of a layer, each of which moe_tp ranks have a part of: two matrices.
    assert sum(reads.experts.values()) == 2 * SIZES["num_hidden_layers"] * mapping["moe_tp_size"] * 2
    assert decoder.unused() == []


@pytest.mark.parametrize("tokens", [[], [3, SIZES["vocab_size"]], [-1]])
def test_tokens_that_are_not_in_the_vocabulary(tokens: list[int], ranks: Ranks) -> None:
    with pytest.raises(BadInput, match="tokens"):
        Decoder(ranks("llama", "tp1")).logits(torch.tensor(tokens, dtype=torch.int64))


CHANGES = {
    "architecture": "GPT2LMHeadModel",
    "hidden_act": "relu",
    "residual_mlp": True,
    "use_logn_attn": True,
    "fc_after_embed": True,
    "position_embedding_type": "learned_absolute",
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_is_not_computed_here_is_refused_by_name(key: str, ranks: Ranks) -> None:
    checkpoint = ranks("llama", "tp1")
    with pytest.raises(BadInput, match=f"config.json: {key}: found .*; expected"):
        Decoder(replace(checkpoint, config={**checkpoint.config, key: CHANGES[key]}))


@pytest.mark.parametrize("change", [{"normalization_mode": 3}, {"normalization_mode": 4}])
def test_routing_that_is_not_computed_here_is_refused_by_name(change: dict[str, int], ranks: Ranks) -> None:
    checkpoint = ranks("mixtral", "ep2")
    config = {**checkpoint.config, "moe": {**checkpoint.config["moe"], **change}}
    with pytest.raises(BadInput, match=r"moe\.normalization_mode: found"):
        Decoder(replace(checkpoint, config=config))
    for key, value in (("mlp_only_layers", [1]), ("decoder_sparse_step", 2)):
        with pytest.raises(BadInput, match=f"config.json: {key}: found"):
            Decoder(replace(checkpoint, config={**checkpoint.config, key: value}))
    # An expert that is not gated would be another model.
    with pytest.raises(BadInput, match="hidden_act: found 'silu'"):
        Decoder(replace(checkpoint, config={**checkpoint.config, "hidden_act": "silu"}))


def test_every_key_that_is_missing_is_named(ranks: Ranks) -> None:
    checkpoint = ranks("llama", "tp1")
    config = {key: value for key, value in checkpoint.config.items() if key not in ("vocab_size", "hidden_act")}
    with pytest.raises(BadInput) as raised:
        Decoder(replace(checkpoint, config=config))
    assert [problem.subject for problem in raised.value.problems] == ["config.json: vocab_size", "config.json: hidden_act"]


def test_sizes_that_the_mapping_leaves_open(ranks: Ranks) -> None:
    """TensorRT-LLM writes -1 for those that follow from the others."""
    for name, target in (("llama", "tp4pp2"), ("mixtral", "ep2")):
        checkpoint = ranks(name, target)
        mapping = {**checkpoint.config["mapping"], "moe_tp_size": -1}
        if target != "ep2":
            mapping["moe_ep_size"] = -1
        other = replace(checkpoint, config={**checkpoint.config, "mapping": mapping})
        assert Decoder(other).logits(TOKENS).equal(Decoder(checkpoint).logits(TOKENS))
    with pytest.raises(BadInput, match=r"mapping\.moe_tp_size: found 2, with moe_ep_size 2; expected .* tp_size 2"):
        Decoder(replace(checkpoint, config={**checkpoint.config, "mapping": {**mapping, "moe_tp_size": 2}}))
