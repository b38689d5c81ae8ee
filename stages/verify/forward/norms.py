"""The norms of TensorRT-LLM's classes. Gemma's are RMS norms too: its weights are stored with the 1 added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stages.verify.forward.settings import Settings
from stages.verify.forward.weights import Stage


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[..., features] of the same shape, weight [features]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def norm(stage: Stage, module: str, settings: Settings, x: Tensor) -> Tensor:
    """[tokens, hidden] by a norm of which every rank has a copy."""
    weight = stage.vector(f"{module}.weight", settings.hidden)
    if not settings.layer_norm:
        return rms_norm(x, weight, settings.epsilon)
    bias = stage.vector(f"{module}.bias", settings.hidden)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, settings.epsilon)
