"""Tokens that ranks go on with are those that transformers' generate gives; drawn ones follow their shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from stages.read.ranks import open_checkpoint
from stages.verify.forward.attention import KeyValueCache
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.generation import generate
from tests.end_to_end.test_family_forward import CASES, SIZES, build, ranks_of

PROMPT = torch.randint(SIZES["vocab_size"], (9,), generator=torch.Generator().manual_seed(7))
COUNT = 14  # past the trained length of long rope, and past a window


def made(name: str, target: str, directory: Path, cache_bytes: int = 0) -> tuple[PreTrainedModel, Decoder]:
    model = build(CASES[name])
    model.save_pretrained(directory / "model")
    output = ranks_of(directory / "model", directory / "ranks", target)
    return model, Decoder(open_checkpoint(output), cache_bytes=cache_bytes)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "tp4pp2"),
        ("mixtral", "ep2"),
        ("qwen2_moe", "tp2"),
        ("qwen3", "tp4"),
        ("gemma2", "tp1"),
        ("gemma3", "pp2"),
        ("phi3_long", "tp4"),
        ("phimoe", "ep2"),
        ("granite", "tp2"),
    ],
)
def test_greedy_is_what_transformers_generates(name: str, target: str, tmp_path: Path) -> None:
    model, decoder = made(name, target, tmp_path, cache_bytes=1 << 24)
    theirs = model.generate(PROMPT[None], do_sample=False, max_new_tokens=COUNT, attention_mask=torch.ones(1, len(PROMPT)).long())
    assert list(generate(decoder, PROMPT, COUNT)) == theirs[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return made("llama", "tp1", tmp_path_factory.mktemp("llama"), cache_bytes=1 << 24)[1]


def test_it_stops_behind_the_first_token_that_ends_a_text(llama: Decoder) -> None:
    whole = list(generate(llama, PROMPT, COUNT))
    assert len(whole) == COUNT
    place = whole.index(whole[5])
    assert list(generate(llama, PROMPT, COUNT, stop=(whole[5], whole[9]))) == whole[: min(place, whole.index(whole[9])) + 1]
    assert list(generate(llama, PROMPT, 0)) == []


def test_tokens_come_one_at_a_time(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is computed before it is asked for, and each costs one step of one token."""
    steps: list[int] = []
    step = Decoder.step

    def counted(self: Decoder, tokens: torch.Tensor, cache: KeyValueCache, last: int | None = None) -> torch.Tensor:
        steps.append(len(tokens))
        assert last == 1
        return step(self, tokens, cache, last)

    monkeypatch.setattr(Decoder, "step", counted)
    tokens = generate(llama, PROMPT, COUNT)
    assert steps == []
    for count in range(1, 4):
        next(tokens)
        assert steps == [len(PROMPT)] + [1] * (count - 1)


def test_the_same_seed_draws_the_same(llama: Decoder) -> None:
    drawn = [list(generate(llama, PROMPT, COUNT, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(generate(llama, PROMPT, COUNT, temperature=1.5, top_k=1, seed=3)) == list(generate(llama, PROMPT, COUNT))


@pytest.mark.parametrize("top_k", [0, 3])
def test_tokens_are_drawn_by_their_shares(llama: Decoder, top_k: int) -> None:
    logits = llama.logits(PROMPT)[-1] / 2.0
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    shares = logits.softmax(-1)
    count = 400
    drawn = Counter(next(generate(llama, PROMPT, 1, temperature=2.0, top_k=top_k, seed=seed)) for seed in range(count))
    assert top_k == 0 or len(drawn) <= top_k
    best = int(shares.argmax())
    spread = (count * float(shares[best]) * (1 - float(shares[best]))) ** 0.5
    assert abs(drawn[best] - count * float(shares[best])) <= 4 * spread
