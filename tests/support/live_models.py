"""Small models in memory, of transformers and without it, and the values of the sources that they are opened as."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from pipeline.tensor.placement import whole
from pipeline.tensor.tensors import Source

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
DTYPES = ("float32", "float16", "bfloat16")


def build(kind: str, dtype: str = "float32", **options: Any) -> Any:
    """A seeded model of a few hundred thousand parameters; biases and norms, which start as constants, are random too."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(getattr(torch, dtype))


def stand_in(state: Mapping[str, Any], **config: Any) -> Any:
    """The least that is taken for a model: tensors by name, and a configuration."""
    keys = {"architectures": ["LlamaForCausalLM"], **config}
    return SimpleNamespace(state_dict=lambda **_: dict(state), config=SimpleNamespace(to_dict=lambda: keys))


def arrays(source: Source) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor.block(whole(tensor.shape))) for name, tensor in source.tensors.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
