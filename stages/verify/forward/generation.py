"""Tokens that a decoder goes on with, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from stages.verify.forward.attention import Cache
from stages.verify.forward.decoder import Decoder


def generate(
    decoder: Decoder,
    tokens: Tensor,
    count: int,
    *,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """At most `count` tokens behind a prompt's, int [tokens], each when it is known; the first one of `stop` is the last.

    The likeliest each time, or, at a `temperature` above 0, one drawn by its share among the `top_k` likeliest (0: among all), the
    same ones for the same `seed`. Costs one pass over the weights for the prompt and one for each token but the last.
    Raises what Decoder.step raises.
    """
    generator = torch.Generator().manual_seed(seed)
    cache, new = Cache(), tokens
    for _ in range(count):
        token = _choose(decoder.step(new, cache, last=1)[0], temperature, top_k, generator)
        yield token
        if token in stop:
            return
        new = torch.tensor([token])


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    kept, tokens = logits.topk(min(top_k, len(logits))) if top_k else (logits, torch.arange(len(logits)))
    shares = (kept / temperature).softmax(-1)
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])
