"""Trace each value of a rank file to the source: which rectangle of which source tensor each rectangle of a rank's tensor holds.

The rules follow the checkpoint format (docs/format/checkpoint.md, sections 2, 6 and 12; docs/format/families.md) backwards, from a
rank's rows to the source's. config.json alone says how the model is split. Names of the source are Hugging Face's; where a model
has several names for a module, the one that the source has is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.verify.roundtrip.model_split import Span, model_split, split

PHI = ("Phi3ForCausalLM", "PhiMoEForCausalLM")
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
CLASSIFIERS = ("Qwen2ForSequenceClassification",)
# What Hugging Face's models call a layer's parts: the first name that the source has.
EXPERTS = ("block_sparse_moe.experts.{e}.", "mlp.experts.{e}.")
ROUTERS = ("block_sparse_moe.gate", "mlp.gate", "mlp.router")
NORMS = {
    "post_layernorm": "post_attention_layernorm",
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
}


@dataclass(frozen=True)
class Origin:
    """The origin of some rows of a rank's tensor: a rectangle of a source tensor, or zeros where `source` is "".

    `tensor`: module and parameter ("weight" or "bias"). `rows`: of the rank's matrix, which hold `source_rows` of the source.
    `columns`: of the source, which fill all columns of the rank's matrix (None: all). `expert`: which of the rank's own experts,
    from 0. `added`: what is added to the source's values to make the rank's.
    """

    rank: int
    tensor: str
    rows: Span
    source: str
    source_rows: Span = (0, 0)
    columns: Span | None = None
    expert: int | None = None
    added: float = 0.0

    @property
    def module(self) -> str:
        """The tensor's name without its parameter."""
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The last part of the tensor's name: "weight" or "bias"."""
        return self.tensor.rpartition(".")[2]


def origins(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], ranks: Sequence[Collection[str]]) -> list[Origin]:
    """List the origins of every weight and bias of every rank, tensor by tensor.

    `shapes`: of the source's tensors by name. `ranks`: the names of each rank's tensors; clamp values, scales and buffers among
    them have no origin. The caller reports tensors without an origin, and origins in a source tensor that is not in `shapes`.
    Raises KeyError where config.json lacks a size.
    """
    return [origin for origin in _OriginRules(config, shapes).origins() if origin.tensor in ranks[origin.rank]]


class _OriginRules:
    """The rules of each module for one config.json."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self.config, self.shapes = config, shapes
        self.split = model_split(config)
        self.architecture = config["architecture"]
        self.added = 1.0 if self.architecture in GEMMA else 0.0

    def origins(self) -> Iterator[Origin]:
        sizes = self.split
        for stage, layers in enumerate(sizes.stages()):
            for tp_rank in range(sizes.tp):
                rank = sizes.rank_of(stage, tp_rank)
                if stage == 0:
                    yield from self._embedding(rank, tp_rank)
                for local, layer in enumerate(layers):
                    yield from self._layer(rank, tp_rank, f"transformer.layers.{local}.", f"model.layers.{layer}.")
                if stage == sizes.pp - 1:
                    yield from self._norm(rank, "transformer.ln_f", "model.norm")
                    yield from self._head(rank, tp_rank)

    # One module

    def _first(self, *names: str) -> str:
        """The first of some names that the source has a weight of, or the first of all."""
        return next((name for name in names if f"{name}.weight" in self.shapes), names[0])

    def _rows(self, source: str) -> int:
        shape = self.shapes.get(source, (0,))
        return shape[0] if shape else 0

    def _norm(self, rank: int, module: str, source: str) -> Iterator[Origin]:
        for parameter, added in (("weight", self.added), ("bias", 0.0)):
            whole = (0, self._rows(f"{source}.{parameter}"))
            yield Origin(rank, f"{module}.{parameter}", whole, f"{source}.{parameter}", whole, added=added)

    def _copied(self, rank: int, module: str, source: str) -> Iterator[Origin]:
        whole = (0, self._rows(f"{source}.weight"))
        yield Origin(rank, f"{module}.weight", whole, f"{source}.weight", whole)

    def _stacked(self, rank: int, module: str, parts: Sequence[tuple[str, Span]], expert: int | None = None) -> Iterator[Origin]:
        """A module whose rows are those of several source tensors, one after the other; `parts`: their names and rows."""
        for parameter in ("weight", "bias"):
            start = 0
            for source, rows in parts:
                end = start + rows[1] - rows[0]
                yield Origin(rank, f"{module}.{parameter}", (start, end), f"{source}.{parameter}", rows, expert=expert)
                start = end

    def _row_parallel(
        self, rank: int, module: str, source: str, inner: Callable[[int], Span], expert: int | None = None
    ) -> Iterator[Origin]:
        """A row-parallel module: the rank has the columns that `inner` gives for their number; its bias is whole on every rank."""
        shape = self.shapes.get(f"{source}.weight", (0, 0))
        rows = (0, shape[0])
        yield Origin(rank, f"{module}.weight", rows, f"{source}.weight", rows, inner(shape[1]), expert)
        yield Origin(rank, f"{module}.bias", rows, f"{source}.bias", rows, expert=expert)

    # Outside the layers

    def _embedding(self, rank: int, tp_rank: int) -> Iterator[Origin]:
        module, source, config = "transformer.vocab_embedding.weight", "model.embed_tokens.weight", self.config
        vocab, hidden = self.split.vocab, config["hidden_size"]
        if not config.get("use_parallel_embedding"):
            yield Origin(rank, module, (0, vocab), source, (0, vocab))
        elif config.get("embedding_sharding_dim", 0) == 1 and self.architecture not in GEMMA:
            yield Origin(rank, module, (0, vocab), source, (0, vocab), split(hidden, self.split.tp, tp_rank))
        else:
            yield from self._padded(Origin(rank, module, (0, 0), source), tp_rank)

    def _head(self, rank: int, tp_rank: int) -> Iterator[Origin]:
        if self.architecture in CLASSIFIERS:
            share = split(self._rows("score.weight"), self.split.tp, tp_rank)
            yield from self._stacked(rank, "lm_head", [("score", share)])
            return
        source = self._first("lm_head", "model.embed_tokens")
        for parameter in ("weight", "bias"):
            name = f"{source}.{parameter}" if parameter == "weight" else "lm_head.bias"
            yield from self._padded(Origin(rank, f"lm_head.{parameter}", (0, 0), name), tp_rank)

    def _padded(self, origin: Origin, tp_rank: int) -> Iterator[Origin]:
        """The rank's equal share of the vocabulary's rows; those behind its end are zeros."""
        share = -(-self.split.vocab // self.split.tp)
        first, last = (min(n * share, self.split.vocab) for n in (tp_rank, tp_rank + 1))
        if last > first:
            yield replace(origin, rows=(0, last - first), source_rows=(first, last))
        if last - first < share:
            yield replace(origin, rows=(last - first, share), source="")

    # A layer

    def _layer(self, rank: int, tp_rank: int, rank_prefix: str, source_prefix: str) -> Iterator[Origin]:
        for norm in ("input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", *NORMS):
            yield from self._norm(rank, rank_prefix + norm, source_prefix + NORMS.get(norm, norm))
        yield from self._stacked(rank, f"{rank_prefix}attention.qkv", self._qkv(tp_rank, f"{source_prefix}self_attn."))
        tp = self.split.tp
        dense, output = f"{rank_prefix}attention.dense", f"{source_prefix}self_attn.o_proj"
        yield from self._row_parallel(rank, dense, output, lambda width: split(width, tp, tp_rank))
        if self.config.get("residual_mlp"):
            yield from self._residual(rank, tp_rank, f"{rank_prefix}residual_", f"{source_prefix}residual_")
        if self.split.experts:
            yield from self._experts(rank, tp_rank, f"{rank_prefix}mlp.", source_prefix)
            return
        parts = self._pair(f"{source_prefix}mlp.", lambda rows: split(rows, tp, tp_rank))
        if self.architecture in PHI:
            yield from self._stacked(rank, f"{rank_prefix}mlp.fc", parts)
        else:
            # The activated projection is TensorRT-LLM's fc; Hugging Face's up_proj is its gate.
            up, gate = parts
            yield from self._stacked(rank, f"{rank_prefix}mlp.fc", [gate])
            yield from self._stacked(rank, f"{rank_prefix}mlp.gate", [up])
        yield from self._row_parallel(
            rank, f"{rank_prefix}mlp.proj", f"{source_prefix}mlp.down_proj", lambda width: split(width, tp, tp_rank)
        )

    def _residual(self, rank: int, tp_rank: int, rank_prefix: str, source_prefix: str) -> Iterator[Origin]:
        """Arctic's dense MLP, and the norm before it. w1 is the activated projection, w3 its factor."""
        yield from self._norm(rank, f"{rank_prefix}layernorm", f"{source_prefix}layernorm")
        for module, source in (("fc", "w1"), ("gate", "w3")):
            name = f"{source_prefix}mlp.{source}"
            share = split(self._rows(f"{name}.weight"), self.split.tp, tp_rank)
            yield from self._stacked(rank, f"{rank_prefix}mlp.{module}", [(name, share)])
        down = f"{source_prefix}mlp.w2"
        yield from self._row_parallel(rank, f"{rank_prefix}mlp.proj", down, lambda width: split(width, self.split.tp, tp_rank))

    def _qkv(self, tp_rank: int, attention: str) -> list[tuple[str, Span]]:
        sizes, size = self.split, self.split.head_size
        queries = split(sizes.heads, sizes.tp, tp_rank)
        if sizes.kv_heads < sizes.tp:  # several ranks have a copy of one head
            head = tp_rank * sizes.kv_heads // sizes.tp
            keys = (head, head + 1)
        else:
            keys = split(sizes.kv_heads, sizes.tp, tp_rank)
        spans = {"q": queries, "k": keys, "v": keys}
        fused = f"{attention}qkv_proj"
        starts = {"q": 0, "k": sizes.heads, "v": sizes.heads + sizes.kv_heads} if f"{fused}.weight" in self.shapes else None
        result = []
        for part, (first, last) in spans.items():
            start = starts[part] if starts else 0
            rows = ((start + first) * size, (start + last) * size)
            result.append((fused if starts else f"{attention}{part}_proj", rows))
        return result

    def _pair(self, mlp: str, share: Callable[[int], Span]) -> tuple[tuple[str, Span], tuple[str, Span]]:
        """The rank's rows of the up projection and of the gate projection, which is the activated one, as (source name, rows)."""
        fused = f"{mlp}gate_up_proj"
        if f"{fused}.weight" in self.shapes:
            inner = self._rows(f"{fused}.weight") // 2
            first, last = share(inner)
            return (fused, (inner + first, inner + last)), (fused, (first, last))
        up, gate = f"{mlp}up_proj", f"{mlp}gate_proj"
        return (up, share(self._rows(f"{up}.weight"))), (gate, share(self._rows(f"{gate}.weight")))

    def _experts(self, rank: int, tp_rank: int, rank_prefix: str, source_prefix: str) -> Iterator[Origin]:
        sizes = self.split
        yield from self._copied(rank, f"{rank_prefix}router", self._first(*(source_prefix + name for name in ROUTERS)))
        local_experts = sizes.experts // sizes.moe_ep

        def share(length: int) -> Span:
            return split(length, sizes.moe_tp, tp_rank // sizes.moe_ep)

        for local in range(local_experts):
            number = tp_rank % sizes.moe_ep * local_experts + local
            prefix = [source_prefix + pattern.format(e=number) for pattern in EXPERTS]
            up, gate, down = (
                self._first(*(place + name for place in prefix for name in names))
                for names in (("w3", "up_proj"), ("w1", "gate_proj"), ("w2", "down_proj"))
            )
            parts = [(name, share(self._rows(f"{name}.weight"))) for name in (up, gate)]
            yield from (origin for origin in self._stacked(rank, f"{rank_prefix}fc", parts, local) if origin.parameter == "weight")
            yield from (
                origin
                for origin in self._row_parallel(rank, f"{rank_prefix}proj", down, share, local)
                if origin.parameter == "weight"
            )
        shared = f"{source_prefix}mlp.shared_expert."
        parts = list(self._pair(shared, lambda rows: split(rows, sizes.tp, tp_rank)))
        yield from self._stacked(rank, f"{rank_prefix}shared_expert.fc", parts)
        name = f"{rank_prefix}shared_expert.proj"
        yield from self._row_parallel(rank, name, f"{shared}down_proj", lambda width: split(width, sizes.tp, tp_rank))
        yield from self._copied(rank, f"{rank_prefix}shared_expert_gate", f"{source_prefix}mlp.shared_expert_gate")
