"""Where each value of a rank file comes from: rectangles of its tensors, and the rectangles of the source that they hold.

Written from the checkpoint format (sections 2, 6 and 12; families) backwards: from a rank's rows to the source's. config.json alone
says how the model is cut. Names of the source are Hugging Face's; where a model has several, the one that is there is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Span = tuple[int, int]

PHI = ("Phi3ForCausalLM", "PhiMoEForCausalLM")
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
# What Hugging Face's models call a layer's parts: the first name that the source has.
EXPERTS = ("block_sparse_moe.experts.{e}.", "mlp.experts.{e}.")
ROUTERS = ("block_sparse_moe.gate", "mlp.gate", "mlp.router")
NORMS = {
    "post_layernorm": "post_attention_layernorm",
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
}


@dataclass(frozen=True)
class Piece:
    """Rows of a rank's tensor that are a rectangle of a source tensor, or zeros where `source` is "".

    `tensor`: module and parameter ("weight" or "bias"). `expert`: which of the rank's own. `rows`: of the rank's matrix, all of
    whose columns are `columns` of the source (None: all). `added`: what the rank's value has more than the source's.
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
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        return self.tensor.rpartition(".")[2]


@dataclass(frozen=True)
class Cut:
    """How config.json says that a model is cut."""

    tp: int
    pp: int
    ep: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    def rank_of(self, stage: int, tp_rank: int) -> int:
        return stage * self.tp + tp_rank

    def stages(self) -> list[range]:
        """Each stage's layers by their number in the model: the first stages have one more where they do not divide."""
        share, more = divmod(self.layers, self.pp)
        starts = [n * share + min(n, more) for n in range(self.pp + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]


def cut_of(config: Mapping[str, Any]) -> Cut:
    """The sizes of a config.json. Raises KeyError where one is missing."""
    mapping, heads = config["mapping"], config["num_attention_heads"]
    tp = mapping.get("tp_size", 1)
    head_size = config.get("head_size") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    sizes = (config["num_hidden_layers"], heads, kv_heads, head_size, config["vocab_size"])
    return Cut(tp, mapping.get("pp_size", 1), mapping.get("moe_ep_size", 1), *sizes)


def origins(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], ranks: Sequence[Collection[str]]) -> list[Piece]:
    """The pieces of every weight and bias of every rank, tensor by tensor.

    `shapes`: of the source's tensors by name. `ranks`: the names of each rank's tensors; of these, clamp values, scales and buffers
    have no origin. A tensor without any piece, or a piece with a source that is not in `shapes`, is for the caller to report.
    """
    return [piece for piece in _Origins(config, shapes).pieces() if piece.tensor in ranks[piece.rank]]


def split(length: int, count: int, index: int) -> Span:
    """The index-th of `count` equal parts."""
    return length * index // count, length * (index + 1) // count


class _Origins:
    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self.config, self.shapes = config, shapes
        self.cut = cut_of(config)
        self.architecture = config["architecture"]
        self.added = 1.0 if self.architecture in GEMMA else 0.0

    def pieces(self) -> Iterator[Piece]:
        cut = self.cut
        for stage, layers in enumerate(cut.stages()):
            for tp_rank in range(cut.tp):
                rank = cut.rank_of(stage, tp_rank)
                if stage == 0:
                    yield from self._embedding(rank, tp_rank)
                for local, layer in enumerate(layers):
                    yield from self._layer(rank, tp_rank, f"transformer.layers.{local}.", f"model.layers.{layer}.")
                if stage == cut.pp - 1:
                    yield from self._norm(rank, "transformer.ln_f", "model.norm")
                    yield from self._head(rank, tp_rank)

    # One module

    def _first(self, *names: str) -> str:
        """The first name that the source has, or the first of all."""
        return next((name for name in names if f"{name}.weight" in self.shapes), names[0])

    def _rows(self, source: str) -> int:
        shape = self.shapes.get(source, (0,))
        return shape[0] if shape else 0

    def _norm(self, rank: int, module: str, source: str) -> Iterator[Piece]:
        for parameter, added in (("weight", self.added), ("bias", 0.0)):
            whole = (0, self._rows(f"{source}.{parameter}"))
            yield Piece(rank, f"{module}.{parameter}", whole, f"{source}.{parameter}", whole, added=added)

    def _copied(self, rank: int, module: str, source: str) -> Iterator[Piece]:
        whole = (0, self._rows(f"{source}.weight"))
        yield Piece(rank, f"{module}.weight", whole, f"{source}.weight", whole)

    def _stacked(self, rank: int, module: str, parts: Sequence[tuple[str, Span]], expert: int | None = None) -> Iterator[Piece]:
        """A module whose rows are those of several source tensors, one after the other."""
        for parameter in ("weight", "bias"):
            start = 0
            for source, rows in parts:
                end = start + rows[1] - rows[0]
                yield Piece(rank, f"{module}.{parameter}", (start, end), f"{source}.{parameter}", rows, expert=expert)
                start = end

    def _row_parallel(
        self, rank: int, module: str, source: str, inner: Callable[[int], Span], expert: int | None = None
    ) -> Iterator[Piece]:
        """A module of which the rank has some columns; its bias is whole on every rank."""
        shape = self.shapes.get(f"{source}.weight", (0, 0))
        rows = (0, shape[0])
        yield Piece(rank, f"{module}.weight", rows, f"{source}.weight", rows, inner(shape[1]), expert)
        yield Piece(rank, f"{module}.bias", rows, f"{source}.bias", rows, expert=expert)

    # Outside the layers

    def _embedding(self, rank: int, tp_rank: int) -> Iterator[Piece]:
        module, source, config = "transformer.vocab_embedding.weight", "model.embed_tokens.weight", self.config
        vocab, hidden = self.cut.vocab, config["hidden_size"]
        if not config.get("use_parallel_embedding"):
            yield Piece(rank, module, (0, vocab), source, (0, vocab))
        elif config.get("embedding_sharding_dim", 0) == 1 and self.architecture not in GEMMA:
            yield Piece(rank, module, (0, vocab), source, (0, vocab), split(hidden, self.cut.tp, tp_rank))
        else:
            yield from self._padded(Piece(rank, module, (0, 0), source), tp_rank)

    def _head(self, rank: int, tp_rank: int) -> Iterator[Piece]:
        source = self._first("lm_head", "model.embed_tokens")
        for parameter in ("weight", "bias"):
            name = f"{source}.{parameter}" if parameter == "weight" else "lm_head.bias"
            yield from self._padded(Piece(rank, f"lm_head.{parameter}", (0, 0), name), tp_rank)

    def _padded(self, piece: Piece, tp_rank: int) -> Iterator[Piece]:
        """A rank's equal share of the vocabulary's rows, of which those behind its end are zeros."""
        share = -(-self.cut.vocab // self.cut.tp)
        first, last = (min(n * share, self.cut.vocab) for n in (tp_rank, tp_rank + 1))
        if last > first:
            yield replace(piece, rows=(0, last - first), source_rows=(first, last))
        if last - first < share:
            yield replace(piece, rows=(last - first, share), source="")

    # A layer

    def _layer(self, rank: int, tp_rank: int, ours: str, theirs: str) -> Iterator[Piece]:
        for norm in ("input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", *NORMS):
            yield from self._norm(rank, ours + norm, theirs + NORMS.get(norm, norm))
        yield from self._stacked(rank, f"{ours}attention.qkv", self._qkv(tp_rank, f"{theirs}self_attn."))
        tp = self.cut.tp
        dense, output = f"{ours}attention.dense", f"{theirs}self_attn.o_proj"
        yield from self._row_parallel(rank, dense, output, lambda width: split(width, tp, tp_rank))
        if self.config.get("moe", {}).get("num_experts"):
            yield from self._experts(rank, tp_rank, f"{ours}mlp.", theirs)
            return
        parts = self._pair(f"{theirs}mlp.", lambda rows: split(rows, tp, tp_rank))
        if self.architecture in PHI:
            yield from self._stacked(rank, f"{ours}mlp.fc", parts)
        else:
            # The activated projection is TensorRT-LLM's fc; Hugging Face's up_proj is its gate.
            up, gate = parts
            yield from self._stacked(rank, f"{ours}mlp.fc", [gate])
            yield from self._stacked(rank, f"{ours}mlp.gate", [up])
        yield from self._row_parallel(rank, f"{ours}mlp.proj", f"{theirs}mlp.down_proj", lambda width: split(width, tp, tp_rank))

    def _qkv(self, tp_rank: int, attention: str) -> list[tuple[str, Span]]:
        cut, size = self.cut, self.cut.head_size
        queries = split(cut.heads, cut.tp, tp_rank)
        if cut.kv_heads < cut.tp:  # several ranks have a copy of one head
            head = tp_rank * cut.kv_heads // cut.tp
            keys = (head, head + 1)
        else:
            keys = split(cut.kv_heads, cut.tp, tp_rank)
        spans = {"q": queries, "k": keys, "v": keys}
        fused = f"{attention}qkv_proj"
        starts = {"q": 0, "k": cut.heads, "v": cut.heads + cut.kv_heads} if f"{fused}.weight" in self.shapes else None
        result = []
        for part, (first, last) in spans.items():
            start = starts[part] if starts else 0
            rows = ((start + first) * size, (start + last) * size)
            result.append((fused if starts else f"{attention}{part}_proj", rows))
        return result

    def _pair(self, mlp: str, share: Callable[[int], Span]) -> tuple[tuple[str, Span], tuple[str, Span]]:
        """The rank's rows of the up projection and of the gate, which is the activated one."""
        fused = f"{mlp}gate_up_proj"
        if f"{fused}.weight" in self.shapes:
            inner = self._rows(f"{fused}.weight") // 2
            first, last = share(inner)
            return (fused, (inner + first, inner + last)), (fused, (first, last))
        up, gate = f"{mlp}up_proj", f"{mlp}gate_proj"
        return (up, share(self._rows(f"{up}.weight"))), (gate, share(self._rows(f"{gate}.weight")))

    def _experts(self, rank: int, tp_rank: int, ours: str, theirs: str) -> Iterator[Piece]:
        cut = self.cut
        yield from self._copied(rank, f"{ours}router", self._first(*(theirs + name for name in ROUTERS)))
        moe_tp, held = cut.tp // cut.ep, self.config["moe"]["num_experts"] // cut.ep

        def share(length: int) -> Span:
            return split(length, moe_tp, tp_rank // cut.ep)

        for local in range(held):
            number = tp_rank % cut.ep * held + local
            prefix = [theirs + pattern.format(e=number) for pattern in EXPERTS]
            up, gate, down = (
                self._first(*(place + name for place in prefix for name in names))
                for names in (("w3", "up_proj"), ("w1", "gate_proj"), ("w2", "down_proj"))
            )
            parts = [(name, share(self._rows(f"{name}.weight"))) for name in (up, gate)]
            yield from (piece for piece in self._stacked(rank, f"{ours}fc", parts, local) if piece.parameter == "weight")
            yield from (
                piece for piece in self._row_parallel(rank, f"{ours}proj", down, share, local) if piece.parameter == "weight"
            )
        shared = f"{theirs}mlp.shared_expert."
        parts = list(self._pair(shared, lambda rows: split(rows, cut.tp, tp_rank)))
        yield from self._stacked(rank, f"{ours}shared_expert.fc", parts)
        name = f"{ours}shared_expert.proj"
        yield from self._row_parallel(rank, name, f"{shared}down_proj", lambda width: split(width, cut.tp, tp_rank))
        yield from self._copied(rank, f"{ours}shared_expert_gate", f"{theirs}mlp.shared_expert_gate")
