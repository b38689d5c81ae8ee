"""The MLP over the ranks: dense, or a mixture of experts, each of which is computed only for the tokens that are routed to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import Problem, VerificationFailed
from stages.verify.forward.settings import DecoderSettings
from stages.verify.forward.weights import PipelineStage

SPARSE_MIXER_EPSILON = 0.01  # of a `moe` that has none (docs/format/checkpoint.md, section 5)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU with tanh, which TensorRT-LLM computes under both of its names."""
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}


def halves(x: Tensor) -> Tensor:
    """SwiGLU of a projection [..., 2 * features], whose first half is the factor and whose second half is activated."""
    factor, activated = x.chunk(2, -1)
    return factor * functional.silu(activated)


class FeedForward:
    """Computes the MLP of every layer."""

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings

    def __call__(self, stage: PipelineStage, module: str, x: Tensor) -> Tensor:
        """The output of MLP `module` for activations `x`, both float32 [tokens, hidden]."""
        settings = self.settings
        if settings.experts:
            return self._mixture(stage, module, x)
        if settings.fused_mlp:
            return self._fused(stage, module, x, settings.inner)
        return self._gated(stage, module, x, settings.inner, ACTIVATIONS[settings.config["hidden_act"]])

    def dense(self, stage: PipelineStage, module: str, x: Tensor) -> Tensor:
        """The output of a dense MLP beside experts, as wide as the model."""
        return self._gated(stage, module, x, self.settings.hidden // self.settings.tp, functional.silu)

    def _gated(self, stage: PipelineStage, module: str, x: Tensor, inner: int, activate: Callable[[Tensor], Tensor]) -> Tensor:
        settings = self.settings

        def part(rank: int) -> Tensor:
            activated = activate(stage.part(rank, x, f"{module}.fc", inner, bias=settings.mlp_bias))
            return activated * stage.part(rank, x, f"{module}.gate", inner, bias=settings.mlp_bias)

        return stage.total(part, f"{module}.proj", settings.hidden, bias=settings.mlp_bias)

    def _fused(self, stage: PipelineStage, module: str, x: Tensor, inner: int) -> Tensor:
        """An MLP whose `fc` is both projections; `inner`: its intermediate features on a rank."""
        return stage.total(
            lambda rank: halves(stage.part(rank, x, f"{module}.fc", 2 * inner)), f"{module}.proj", self.settings.hidden
        )

    def _mixture(self, stage: PipelineStage, module: str, x: Tensor) -> Tensor:
        shares = route(stage.copied(x, f"{module}.router", self.settings.experts), self.settings)
        result, inner = torch.zeros_like(x), self.settings.expert_inner
        count = self.settings.experts // self.settings.ep
        for place, rank in enumerate(stage.ranks):
            self._check_stacks(stage, rank, module, count)
            for expert in range(count):
                # A rank has a block of experts; the ranks that have the same block have a part of each.
                share = shares[:, place % self.settings.ep * count + expert]
                tokens = share.nonzero()[:, 0]
                if len(tokens):
                    middle = halves(stage.weights.product(x[tokens], rank, f"{module}.fc", 2 * inner, expert=expert))
                    output = stage.weights.product(middle, rank, f"{module}.proj", self.settings.hidden, expert=expert)
                    result.index_add_(0, tokens, output * share[tokens, None])
        if self.settings.shared_inner:
            gate = torch.sigmoid(stage.copied(x, f"{module}.shared_expert_gate", 1))
            result += self._fused(stage, f"{module}.shared_expert", x, self.settings.shared_inner) * gate
        return result

    def _check_stacks(self, stage: PipelineStage, rank: int, module: str, count: int) -> None:
        """Raise VerificationFailed where a rank does not stack `count` experts."""
        for name in ("fc", "proj"):
            shape = stage.weights.tensor(rank, f"{module}.{name}.weight").shape
            # Expert 0 is read here, as it may be that no token is routed to any expert of the rank.
            stage.weights.matrix(rank, f"{module}.{name}", 0)
            if len(shape) != 3 or shape[0] != count:
                subject = f"rank{rank}.safetensors: {module}.{name}.weight"
                expected = f"[{count}, ...]: the rank's experts"
                raise VerificationFailed([Problem(subject, f"shape {list(shape)}", expected)])


def route(scores: Tensor, settings: DecoderSettings) -> Tensor:
    """Compute each expert's share in each token's output from the router's scores: both [tokens, experts], 0 for unused experts."""
    count = int(settings.moe["top_k"])
    if settings.routing == 2:
        return sparse_mixer(scores, count, 2 * float(settings.moe.get("sparse_mixer_epsilon", SPARSE_MIXER_EPSILON)))
    shares = scores.softmax(-1)
    best = shares.topk(count, -1)
    result = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
    return result / result.sum(-1, keepdim=True) if settings.routing == 1 else result


def sparse_mixer(scores: Tensor, count: int, margin: float) -> Tensor:
    """Choose `count` experts one by one: each has its share among the remaining ones that score nearly as much.

    `scores`: [tokens, experts]. `margin`: the relative distance from the best score within which experts share. Returns their
    shares, [tokens, experts].
    """
    result, left = torch.zeros_like(scores), scores
    for _ in range(count):
        top = left.max(-1, keepdim=True)
        near = (top.values - left) / torch.maximum(left.abs(), top.values) <= margin
        shares = left.masked_fill(~near, -math.inf).softmax(-1)
        result = result.scatter(-1, top.indices, shares.gather(-1, top.indices))
        left = left.scatter(-1, top.indices, -math.inf)
    return result
