"""A decoder's logits from the files of its ranks, as TensorRT-LLM's classes compute them, in float32 and in little memory.

Partial sums of tensor-parallel ranks are added up, pipeline stages follow one another, kernels' layouts are read as the numbers
that they stand for. Not emulated: the 8 bits that FP8 kernels round activations to (`activation_scaling_factor`, and `clamp_val` of
the rowwise ones), an FP8 cache of keys and values, and the 16 bits of everything else. A sequence that grows past long rope's
trained length is computed anew from its first token, as transformers does; an engine goes on with what it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.forward.attention import Attention, Cache
from stages.verify.forward.experts import FeedForward
from stages.verify.forward.norms import norm
from stages.verify.forward.settings import Settings
from stages.verify.forward.weights import Stage, Weights

BLOCK_BYTES = 64 << 20
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head"


class Decoder:
    """The model that a checkpoint's config.json describes, over all of its ranks.

    `block_bytes`: of one weight as float32 that is in memory at once (one row at least). `cache_bytes`: of blocks that are kept for
    the next token; a model whose weights as float32 fit is read once.

    Raises BadInput naming what of config.json is not computed here. Running it raises VerificationFailed naming a tensor that is
    missing or of a wrong shape, that must be a copy on every rank and is not, or whose padding is not zeros; `unused` tells those
    that nothing needed.
    """

    def __init__(self, checkpoint: Checkpoint, block_bytes: int = BLOCK_BYTES, cache_bytes: int = 0) -> None:
        self.settings = settings = Settings(checkpoint.config)
        if len(checkpoint.ranks) != settings.tp * settings.pp:
            expected = f"{settings.tp * settings.pp}: tp_size {settings.tp} * pp_size {settings.pp}"
            raise VerificationFailed([Problem("config.json: mapping", f"{len(checkpoint.ranks)} rank files", expected)])
        self._weights = Weights(checkpoint, block_bytes, cache_bytes)
        self._stages = [Stage(self._weights, range(n * settings.tp, (n + 1) * settings.tp)) for n in range(settings.pp)]
        self._attention, self._mlp = Attention(settings, block_bytes), FeedForward(settings)

    def logits(self, tokens: Tensor) -> Tensor:
        """float32 [tokens, vocab_size] of one sequence, int [tokens]: row n is what token n is followed by."""
        return self.step(tokens, Cache())

    def step(self, tokens: Tensor, cache: Cache, last: int | None = None) -> Tensor:
        """float32 [last, vocab_size]: logits of the last of new tokens (default: of all), int [tokens], behind those of the cache.

        The same as the last rows of `logits` of all tokens. The cache then has the new tokens too; a fresh `Cache()` has none.
        Raises BadInput for no tokens, and such as are not in the vocabulary.
        """
        settings = self.settings
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= settings.vocab:
            found = f"tokens from {int(tokens.min())} to {int(tokens.max())}" if len(tokens) else "no tokens"
            raise BadInput([Problem("tokens", found, f"some of 0 to {settings.vocab - 1}")])
        last = len(tokens) if last is None else last
        before, cache.tokens = len(cache.tokens), torch.cat([cache.tokens, tokens])
        if self._attention.rotation.changes(before, len(cache.tokens)):
            cache.clear()
            tokens = cache.tokens
        x = self._embed(tokens) * settings.embedding_scale
        for number, stage in enumerate(self._stages):
            for local, layer in enumerate(settings.layers_of(number)):
                x = self._layer(stage, f"transformer.layers.{local}", layer, x, cache)
        x = norm(self._stages[-1], "transformer.ln_f", settings, x[len(x) - last :])
        result = self._head(x) * settings.logit_scale
        if settings.logit_cap:
            result = torch.tanh(result / settings.logit_cap) * settings.logit_cap
        return result

    def unused(self) -> list[str]:
        """Tensors that nothing has asked for so far, each after its file's name: after a run, those that the model does not need.

        What config.json's model has no use for must not be there. The loader's own buffers are not among them.
        """
        return self._weights.unused()

    def _layer(self, stage: Stage, module: str, layer: int, x: Tensor, cache: Cache) -> Tensor:
        settings = self.settings
        between = settings.norms_between
        inner = self._attention(stage, f"{module}.attention", layer, norm(stage, f"{module}.input_layernorm", settings, x), cache)
        if between:
            inner = norm(stage, f"{module}.post_layernorm", settings, inner)
        x = x + inner * settings.residual_scale
        before = "pre_feedforward_layernorm" if between else "post_layernorm"
        inner = self._mlp(stage, f"{module}.mlp", norm(stage, f"{module}.{before}", settings, x))
        if between:
            inner = norm(stage, f"{module}.post_feedforward_layernorm", settings, inner)
        return x + inner * settings.residual_scale

    def _embed(self, tokens: Tensor) -> Tensor:
        """[tokens, hidden]: the tokens' own rows of the table alone, which may be split by rows or by columns."""
        settings, weights, ranks = self.settings, self._weights, self._stages[0].ranks
        module = EMBEDDING.removesuffix(".weight")
        parallel, dim = settings.config.get("use_parallel_embedding", False), settings.config.get("embedding_sharding_dim", 0)
        if not parallel:
            weights.same(ranks, EMBEDDING)
            return self._lookup(ranks[0], tokens, (settings.vocab, settings.hidden))
        if dim == 1:
            parts = [self._lookup(rank, tokens, (settings.vocab, settings.hidden // settings.tp)) for rank in ranks]
            return torch.cat(parts, -1)
        rows = -(-settings.vocab // settings.tp)
        result = torch.empty(len(tokens), settings.hidden)
        for place, rank in enumerate(ranks):
            weights.matrix(rank, module)
            weights.zeros(rank, EMBEDDING, settings.vocab - place * rows)
            mine = tokens // rows == place
            result[mine] = self._lookup(rank, tokens[mine] - place * rows, (rows, settings.hidden))
        return result

    def _lookup(self, rank: int, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        table = self._weights.matrix(rank, EMBEDDING.removesuffix(".weight"))
        if table.shape != shape:
            subject = f"rank{rank}.safetensors: {EMBEDDING}"
            raise VerificationFailed([Problem(subject, f"a matrix {list(table.shape)}", f"{list(shape)}")])
        rows = {token: table.rows(token, token + 1) for token in sorted(set(tokens.tolist()))}
        return torch.cat([rows[token] for token in tokens.tolist()]) if rows else torch.empty(0, shape[1])

    def _head(self, x: Tensor) -> Tensor:
        """[tokens, vocab_size]: each rank has as many rows of lm_head, the last of which are padding."""
        settings, stage = self.settings, self._stages[-1]
        rows = -(-settings.vocab // settings.tp)
        biased = settings.layer_norm and stage.has(f"{HEAD}.bias")
        parts = []
        for place, rank in enumerate(stage.ranks):
            parts.append(stage.part(rank, x, HEAD, rows, bias=biased))
            for parameter in ("weight", "bias") if biased else ("weight",):
                self._weights.zeros(rank, f"{HEAD}.{parameter}", settings.vocab - place * rows)
        return torch.cat(parts, -1)[:, : settings.vocab]
