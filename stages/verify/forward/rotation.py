"""Rotate the features of heads by position as TensorRT-LLM does: the angle of each pair of features at a position.

Facts: docs/format/checkpoint.md, section 4; `RopeEmbeddingUtils` and `Attention.create_attention_const_params` of TensorRT-LLM for
yarn and long rope.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadInput, Problem
from pipeline.model.computes import LOCAL_ROPE
from stages.verify.forward.settings import DecoderSettings

# mrope: the position of a token of text is the same on all of its axes, so that it turns as rope_gpt_neox does.
POSITIONS = ("rope_gpt_neox", "long_rope", "mrope")
FLOAT32 = np.dtype(np.float32)


class Rotation:
    """Rotates heads by their positions. Raises BadInput naming keys of config.json that ask for another kind of rotation."""

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings
        self.scaling: Mapping[str, Any] = settings.config.get("rotary_scaling") or {}
        self.kind = self.scaling.get("type", self.scaling.get("rope_type"))
        self.long_rope = settings.config.get("position_embedding_type", "rope_gpt_neox") == "long_rope"
        problems = self._unknown()
        if problems:
            raise BadInput(problems)
        self._tables: dict[tuple[bool, bool], tuple[Tensor, Tensor]] = {}

    def rotate(self, heads: Tensor, start: int, length: int, *, local: bool = False) -> Tensor:
        """Rotate heads [..., tokens, head_size] whose first token is at position `start` of a sequence of `length` tokens.

        The first `rotary_embedding_dim` features of each are rotated: feature i of their first half with feature i of their second.
        `local`: by the frequencies of local layers.
        """
        size = self.settings.rotary_size
        cos, sin = (table[start : start + heads.shape[-2]] for table in self._table(length, local))
        a, b, rest = heads[..., : size // 2], heads[..., size // 2 : size], heads[..., size:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def changes(self, before: int, after: int) -> bool:
        """Whether growing from one length to another changes the rotation of every token, from the first one on."""
        return self.long_rope and self._which(before) != self._which(after)

    def inverse_frequencies(self, length: int, *, local: bool = False) -> np.ndarray:
        """The angle from one position to the next, in radians, for a sequence of `length`: float32 [rotary_embedding_dim / 2]."""
        config, size = self.settings.config, self.settings.rotary_size
        base = float(config["rope_local_base_freq"] if local else config.get("rotary_base", 10000.0))
        powers = (base ** (np.arange(0, size, 2) / size)).astype(FLOAT32)
        if self.long_rope:
            factors = np.asarray(config[f"longrope_scaling_{self._which(length)}_factors"], dtype=FLOAT32)
            return 1 / (factors * powers)
        if self.kind == "linear":
            return FLOAT32.type(1 / self.scaling.get("factor", 1.0)) / powers
        if self.kind == "llama3":
            return _llama3((1 / powers).astype(np.float64), self.scaling)
        if self.kind == "yarn":
            return _yarn(powers, base, size, self.scaling)
        return 1 / powers

    def magnitude(self, length: int) -> float:
        """The factor of rotated values for a sequence of `length`."""
        config = self.settings.config
        if self.long_rope and self.settings.architecture == "PhiMoEForCausalLM":
            return float(config[f"longrope_{self._which(length)}_mscale"])
        if self.long_rope:
            trained = config["original_max_position_embeddings"]
            growth = self.settings.max_positions / trained
            return math.sqrt(1 + math.log(growth) / math.log(trained)) if growth > 1 else 1.0
        if self.kind == "yarn":
            factor = self.scaling.get("factor", 1.0)
            ours, all_ = self.scaling.get("mscale", 1.0), self.scaling.get("mscale_all_dim", 0.0)
            return _yarn_scale(factor, ours) / _yarn_scale(factor, all_)
        return 1.0

    def _unknown(self) -> list[Problem]:
        """Problems of keys that are missing or ask for rotations that are not computed here."""
        config = self.settings.config
        kind = config.get("position_embedding_type", "rope_gpt_neox")
        problems = []
        if kind not in POSITIONS:
            problems.append(Problem("config.json: position_embedding_type", repr(kind), f"one of {', '.join(POSITIONS)}"))
        needed = ["rope_local_base_freq"] if self.settings.has(LOCAL_ROPE) else []
        if self.long_rope:
            needed += ["original_max_position_embeddings", "longrope_scaling_short_factors", "longrope_scaling_long_factors"]
            if self.settings.architecture == "PhiMoEForCausalLM":
                needed += ["longrope_short_mscale", "longrope_long_mscale"]
        problems += [Problem(f"config.json: {key}", "nothing", "a value") for key in needed if config.get(key) is None]
        if self.scaling and self.long_rope:
            problems.append(Problem("config.json: rotary_scaling.type", repr(self.kind), "null beside long_rope"))
        if self.kind == "dynamic":
            # With alpha it is another scaling than transformers' of the same name; without, the class does not take it.
            problems.append(Problem("config.json: rotary_scaling.type", "'dynamic'", "a scaling that is computed here, or null"))
        return problems

    def _which(self, length: int) -> str:
        """Which factors long rope uses for a sequence of `length`."""
        return "long" if length > self.settings.config["original_max_position_embeddings"] else "short"

    def _table(self, length: int, local: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, rotary_embedding_dim / 2] for at least `length` positions."""
        key = local, self.long_rope and self._which(length) == "long"
        table = self._tables.get(key)
        if table is None or len(table[0]) < length:
            # Twice as many positions as are needed, so that the table is not computed anew for each token.
            positions = torch.arange(2 * length, dtype=torch.float32)
            angles = positions[:, None] * torch.from_numpy(self.inverse_frequencies(length, local=local))
            scale = self.magnitude(length)
            table = self._tables[key] = angles.cos() * scale, angles.sin() * scale
        return table


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """LLaMA 3's scaling of frequencies [n]: long waves are stretched, short ones are not, those between are in part."""
    factor, low = scaling.get("factor", 8.0), scaling.get("low_freq_factor", 1.0)
    high, trained = scaling.get("high_freq_factor", 4.0), scaling.get("original_max_position_embeddings", 8192)
    share = np.clip((trained * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    result: np.ndarray = ((1 - share) * frequencies / factor + share * frequencies).astype(FLOAT32)
    return result


def _yarn(powers: np.ndarray, base: float, size: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Yarn's frequencies [size / 2]: by their number, up to `low` they are kept, from `high` on stretched, between in part."""
    trained = scaling.get("original_max_position_embeddings", 4096)

    def number(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(number(scaling.get("beta_fast", 32.0))), 0)
    high = min(math.ceil(number(scaling.get("beta_slow", 1.0))), size - 1)
    share = np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
    stretched = powers * FLOAT32.type(scaling.get("factor", 1.0))
    result: np.ndarray = (share / stretched + (1 - share) / powers).astype(FLOAT32)
    return result


def _yarn_scale(factor: float, scale: float) -> float:
    """Yarn's factor of rotated values."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
