"""Attention over the ranks: each computes some heads, and its partial sum of the output projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.verify.forward.cached import as_cached
from stages.verify.forward.norms import rms_norm
from stages.verify.forward.rotation import Rotation
from stages.verify.forward.settings import DecoderSettings
from stages.verify.forward.weights import PipelineStage

CACHE_SCALE = "kv_cache_scaling_factor"


class KeyValueCache:
    """The tokens of a sequence, int [tokens], and their keys and values, [kv heads, tokens, head_size], by layer and rank."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0, dtype=torch.int64)
        self._entries: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget the keys and values."""
        self._entries.clear()

    def extend(self, layer: int, rank: int, k: Tensor, v: Tensor, kind: str = "", scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, [kv heads, new, head_size]; returns those of all tokens.

        `kind`, `scale`: of `as_cached`, by which those that are kept are rounded.
        """
        before, kept = self._entries.get((layer, rank)), (as_cached(k, kind, scale), as_cached(v, kind, scale))
        if before is None:
            self._entries[layer, rank] = kept
            return k, v
        self._entries[layer, rank] = torch.cat([before[0], kept[0]], 1), torch.cat([before[1], kept[1]], 1)
        return torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)


class Attention:
    """Computes the attention of every layer. `block_bytes`: of scores that are in memory at once."""

    def __init__(self, settings: DecoderSettings, block_bytes: int) -> None:
        self.settings, self.block_bytes = settings, block_bytes
        self.rotation = Rotation(settings)

    def __call__(self, stage: PipelineStage, module: str, layer: int, x: Tensor, cache: KeyValueCache) -> Tensor:
        """The attention's output [tokens, hidden] for the last of the cache's tokens; adds their keys and values to the cache.

        `layer`: by its number in the model. `x`: the tokens' activations, float32 [tokens, hidden].
        """
        settings = self.settings
        sizes = [count * settings.head_size for count in (settings.heads, settings.kv_heads, settings.kv_heads)]

        def part(rank: int) -> Tensor:
            qkv = stage.part(rank, x, f"{module}.qkv", sum(sizes), bias=settings.qkv_bias)
            parts = torch.split(qkv, sizes, -1)
            q, k, v = (each.reshape(len(x), -1, settings.head_size).transpose(0, 1) for each in parts)
            if settings.norms_heads:
                q = rms_norm(q, stage.vector(f"{module}.q_layernorm.weight", settings.head_size), settings.head_epsilon)
                k = rms_norm(k, stage.vector(f"{module}.k_layernorm.weight", settings.head_size), settings.head_epsilon)
            length, local = len(cache.tokens), settings.is_local(layer)
            q, k = (self.rotation.rotate(each, length - len(x), length, local=local) for each in (q, k))
            k, v = cache.extend(layer, rank, k, v, *self._codes(stage, f"{module}.{CACHE_SCALE}"))
            return self._attend(q, k, v, settings.window(layer) or length).transpose(0, 1).flatten(1)

        return stage.total(part, f"{module}.dense", settings.hidden, bias=settings.dense_bias)

    def _codes(self, stage: PipelineStage, name: str) -> tuple[str, float]:
        """How the cache rounds: the kind of its codes, "" for none, and their scale, of the tensor `name`."""
        kind = str(self.settings.config.get("quantization", {}).get("kv_cache_quant_algo") or "")
        return (kind, float(stage.vector(name, 1))) if kind and stage.has(name) else ("", 1.0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Attend with queries [heads, new, head_size], of the last tokens, to keys and values [kv heads, all, head_size].

        Each token sees `window` positions, of which its own is the last. Returns [heads, new, head_size].
        """
        heads, new, length = len(q), q.shape[1], k.shape[1]
        # The query heads that share a key head are neighbours.
        q, k, v = q.reshape(len(k), heads // len(k), new, -1) * self.settings.score_scale, k[:, None], v[:, None]
        count = max(self.block_bytes // (4 * heads * length), 1)
        result = torch.empty_like(q)
        for start in range(0, new, count):
            some = q[:, :, start : start + count]
            scores = some @ k.transpose(-1, -2)
            if self.settings.score_cap:
                scores = torch.tanh(scores / self.settings.score_cap) * self.settings.score_cap
            position = torch.arange(some.shape[2])[:, None] + length - new + start
            distance = position - torch.arange(length)
            seen = (distance >= 0) & (distance < window)
            result[:, :, start : start + count] = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        return result.flatten(0, 1)
