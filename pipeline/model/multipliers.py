"""The multipliers of embeddings, scores, residuals and logits, as config.json has them for TensorRT-LLM.

Facts: docs/format/checkpoint.md, section 5, for Granite's; MiniCPM says the same by the model's depth and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Multipliers:
    """The part of `ModelConfig` that computes the multipliers which a model's configuration does not say as they are."""

    attention_multiplier: float
    logits_scaling: float
    head_size: int
    hidden_size: int
    num_hidden_layers: int
    settings: Mapping[str, Any]

    @property
    def scaled_attention_multiplier(self) -> float:
        """The attention multiplier for TensorRT-LLM, which itself multiplies by 1 / sqrt(head_size); the source's includes that.

        NVIDIA's converter leaves out this correction where the model's multiplier is 1.
        """
        return self.attention_multiplier * math.sqrt(self.head_size)

    @property
    def output_multiplier_scale(self) -> float:
        return 1 / self.logits_scaling

    @property
    def depth_multiplier(self) -> float:
        """MiniCPM's factor of what attention and MLP add: its `scale_depth` over the square root of the number of layers."""
        return float(self.settings["scale_depth"]) / math.sqrt(self.num_hidden_layers)

    @property
    def width_multiplier(self) -> float:
        """MiniCPM's factor of logits: the width that it was tuned at, `dim_model_base`, over its own."""
        return float(self.settings["dim_model_base"]) / self.hidden_size
