"""The norms of TensorRT-LLM's classes. Gemma's are RMS norms too: its weights are stored with the 1 added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stages.verify.forward.settings import DecoderSettings
from stages.verify.forward.weights import PipelineStage


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The RMS norm of `x`, [..., features], with a weight [features]."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def norm(stage: PipelineStage, module: str, settings: DecoderSettings, x: Tensor) -> Tensor:
    """Apply the norm `module`, of which every rank has a copy, to [tokens, hidden]."""
    weight = stage.vector(f"{module}.weight", settings.hidden)
    if not settings.layer_norm:
        return rms_norm(x, weight, settings.epsilon)
    bias = stage.vector(f"{module}.bias", settings.hidden)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, settings.epsilon)
