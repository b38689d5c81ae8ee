"""Measure how far two models' logits for the same tokens are apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def agreement(actual: Tensor, expected: Tensor) -> dict[str, Any]:
    """Compare logits, float [tokens, vocabulary], with the expected ones of the same shape.

    Returns `top1_agreement`, the share of positions where both put the same token first; `max_abs`, the largest difference, and
    `max_relative`, the same as a share of the largest expected logit; `kl_mean` and `kl_max`, the Kullback-Leibler divergence from
    the expected distribution by position, in nats.
    """
    error = (actual - expected).abs()
    largest = float(expected.abs().max())
    log_actual, log_expected = actual.double().log_softmax(-1), expected.double().log_softmax(-1)
    divergence = (log_expected.exp() * (log_expected - log_actual)).sum(-1).clamp(min=0)
    return {
        "top1_agreement": float((actual.argmax(-1) == expected.argmax(-1)).double().mean()),
        "max_abs": float(error.max()),
        "max_relative": float(error.max()) / largest if largest else 0.0,
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
    }
