"""Compute a decoder's logits from the files of its ranks, as TensorRT-LLM's classes do, in float32 and in little memory.

Partial sums of tensor-parallel ranks are added up, pipeline stages follow one another, and weights in the kernels' layouts are read
as numbers; a cache of 8 bits rounds what later steps read of it. Not emulated are the 8 bits that FP8 kernels round activations to
(`activation_scaling_factor`, and `clamp_val` of the rowwise ones), and 16-bit arithmetic. A sequence that grows past long rope's
trained length is computed anew from its first token, as transformers does; an engine keeps the keys and values that it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem, VerificationFailed
from pipeline.tensor.checkpoint import Checkpoint
from stages.verify.forward.attention import Attention, KeyValueCache
from stages.verify.forward.experts import FeedForward
from stages.verify.forward.norms import norm
from stages.verify.forward.settings import DecoderSettings
from stages.verify.forward.tensors import to_torch
from stages.verify.forward.weights import CheckpointWeights, PipelineStage

BLOCK_BYTES = 64 << 20
EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head"


class Decoder:
    """The model that a checkpoint's config.json describes, over all of its ranks.

    `block_bytes`: the part of one weight, as float32, that is in memory at once (one row at least). `cache_bytes`: blocks of
    weights that are kept for the next token; a model whose weights fit, as float32, is read once. `int8_activations`: those of
    SmoothQuant are rounded as its classes do.

    Raises BadInput naming the keys of config.json that ask for something that is not computed here, and VerificationFailed for
    another number of rank files. Its methods raise VerificationFailed naming a tensor that is missing or has a wrong shape, that
    differs between ranks although it must not, or whose padding is not zeros. `unused` names the tensors that nothing needed.
    """

    def __init__(
        self, checkpoint: Checkpoint, block_bytes: int = BLOCK_BYTES, cache_bytes: int = 0, int8_activations: bool = True
    ) -> None:
        self.settings = settings = DecoderSettings(checkpoint.config)
        if len(checkpoint.ranks) != settings.tp * settings.pp:
            expected = f"{settings.tp * settings.pp}: tp_size {settings.tp} * pp_size {settings.pp}"
            raise VerificationFailed([Problem("config.json: mapping", f"{len(checkpoint.ranks)} rank files", expected)])
        self._weights = CheckpointWeights(checkpoint, block_bytes, cache_bytes, int8_activations)
        self._stages = [PipelineStage(self._weights, range(n * settings.tp, (n + 1) * settings.tp)) for n in range(settings.pp)]
        self._attention, self._mlp = Attention(settings, block_bytes), FeedForward(settings)

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of one sequence, int [tokens]: float32 [tokens, vocab_size], where row n predicts the token behind token n."""
        return self.step(tokens, KeyValueCache())

    def step(self, tokens: Tensor, cache: KeyValueCache, last: int | None = None) -> Tensor:
        """The logits of the `last` new tokens (default: of all): float32 [last, vocab_size].

        `tokens`: int [tokens], which follow those of the cache, and are added to it. The logits are the last rows of `logits` of
        all tokens. Raises BadInput for no tokens, and for tokens outside the vocabulary.
        """
        settings = self.settings
        self.check_tokens(tokens)
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

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise BadInput for no tokens, and for tokens outside the vocabulary. `tokens`: int [tokens]."""
        vocab = self.settings.vocab
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            found = f"tokens from {int(tokens.min())} to {int(tokens.max())}" if len(tokens) else "no tokens"
            raise BadInput([Problem("tokens", found, f"some of 0 to {vocab - 1}")])

    @property
    def int8_activations(self) -> bool:
        """Whether activations are rounded to 8 bits."""
        algorithm = self.settings.config.get("quantization", {}).get("quant_algo")
        return self._weights.int8_activations and str(algorithm).startswith("W8A8_SQ")

    def unused(self) -> list[str]:
        """The tensors that nothing has read so far, each after its file's name: after a run, those that the model does not need.

        A checkpoint must have none. Buffers that the loader computes itself are not among them.
        """
        return self._weights.unused()

    def _layer(self, stage: PipelineStage, module: str, layer: int, x: Tensor, cache: KeyValueCache) -> Tensor:
        settings = self.settings
        between = settings.norms_between
        inner = self._attention(stage, f"{module}.attention", layer, norm(stage, f"{module}.input_layernorm", settings, x), cache)
        if between:
            inner = norm(stage, f"{module}.post_layernorm", settings, inner)
        read, x = x, x + inner * settings.residual_scale
        if settings.residual_mlp:
            dense = self._mlp.dense(stage, f"{module}.residual_mlp", norm(stage, f"{module}.residual_layernorm", settings, x))
            return x + dense + self._mlp(stage, f"{module}.mlp", norm(stage, f"{module}.post_layernorm", settings, read))
        before = "pre_feedforward_layernorm" if between else "post_layernorm"
        inner = self._mlp(stage, f"{module}.mlp", norm(stage, f"{module}.{before}", settings, x))
        if between:
            inner = norm(stage, f"{module}.post_feedforward_layernorm", settings, inner)
        return x + inner * settings.residual_scale

    def _embed(self, tokens: Tensor) -> Tensor:
        """The tokens' rows of the embedding, [tokens, hidden]; no other rows are read. Ranks may share its rows or its columns."""
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
        owners, held = tokens // rows, list[Tensor]()
        for place, rank in enumerate(ranks):
            weights.matrix(rank, module)
            weights.zeros(rank, EMBEDDING, settings.vocab - place * rows)
            held.append(self._lookup(rank, tokens[owners == place] - place * rows, (rows, settings.hidden)))
        result = torch.empty(len(tokens), settings.hidden)
        for place, part in enumerate(held):
            result[owners == place] = part
        return result

    def _lookup(self, rank: int, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Rows of a rank's embedding, which must have a `shape`: [tokens, shape[1]]."""
        table = self._weights.matrix(rank, EMBEDDING.removesuffix(".weight"))
        if table.shape != shape:
            subject = f"rank{rank}.safetensors: {EMBEDDING}"
            raise VerificationFailed([Problem(subject, f"a matrix {list(table.shape)}", f"{list(shape)}")])
        rows = {token: to_torch(table.rows(token, token + 1)) for token in sorted(set(tokens.tolist()))}
        return torch.cat([rows[token] for token in tokens.tolist()]) if rows else torch.empty(0, shape[1])

    def _head(self, x: Tensor) -> Tensor:
        """The logits before scaling: [tokens, vocab_size], or [tokens, num_labels].

        Each rank has as many rows of lm_head; the last of all are padding.
        """
        settings, stage = self.settings, self._stages[-1]
        rows = -(-settings.outputs // settings.tp)
        biased = settings.layer_norm and stage.has(f"{HEAD}.bias")
        parts = []
        for place, rank in enumerate(stage.ranks):
            parts.append(stage.part(rank, x, HEAD, rows, bias=biased))
            for parameter in ("weight", "bias") if biased else ("weight",):
                self._weights.zeros(rank, f"{HEAD}.{parameter}", settings.outputs - place * rows)
        return torch.cat(parts, -1)[:, : settings.outputs]
