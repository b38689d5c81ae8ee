"""How far two models' logits for the same tokens are apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Figures of logits [tokens, vocabulary] against others of the same shape.

    `top1_agreement`: the share of positions where both put the same token first. `max_abs`, and `max_relative` to the largest
    logit. `kl_mean`, `kl_max`: Kullback-Leibler divergence from theirs by position, in nats.
    """
    error = (ours - theirs).abs()
    largest = float(theirs.abs().max())
    log_ours, log_theirs = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    divergence = (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).clamp(min=0)
    return {
        "top1_agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "max_abs": float(error.max()),
        "max_relative": float(error.max()) / largest if largest else 0.0,
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
    }
