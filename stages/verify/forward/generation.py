"""Generate tokens with a decoder, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from stages.verify.forward.attention import KeyValueCache
from stages.verify.forward.decoder import Decoder


def generate(
    decoder: Decoder,
    tokens: Tensor | Sequence[int],
    count: int,
    *,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield at most `count` tokens that continue a prompt's, int [tokens], each when it is computed; a token of `stop` is the last.

    At temperature 0 each token is the likeliest. Above 0 it is drawn by its share among the `top_k` likeliest (0: among all), and
    the same `seed` draws the same tokens. One pass over the weights is made for the prompt, and one for each token but the last.
    Raises what `Decoder.step` raises.
    """
    generator = torch.Generator().manual_seed(seed)
    cache, new = KeyValueCache(), torch.as_tensor(tokens)
    for _ in range(count):
        token = _choose(decoder.step(new, cache, last=1)[0], temperature, top_k, generator)
        yield token
        if token in stop:
            return
        new = torch.tensor([token])


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Choose a token by its logits, float32 [vocabulary]."""
    if temperature <= 0:
        return int(logits.argmax())
    kept, tokens = logits.topk(min(top_k, len(logits))) if top_k else (logits, torch.arange(len(logits)))
    shares = (kept / temperature).softmax(-1)
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])
