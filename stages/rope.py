"""rope: compute the rotary position buffers from the model's configuration; they are the same on every rank.

TensorRT-LLM's loader computes them itself, so they are written only on request. Facts: docs/format/checkpoint.md, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.model.model_config import ModelConfig
from pipeline.model.parallelism import Parallelism
from pipeline.model.rotary import scaling_kind
from pipeline.tensor.metering import meter
from pipeline.tensor.names import TensorName
from pipeline.tensor.placement import Placement, RankTensor, Region, extent, slices, whole
from pipeline.tensor.tensors import Block, LazyTensor

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class RopeBuffer:
    """One of the three buffers, float32. A block computes only its own positions.

    `embed_positions` [1, positions, head_size]: a position's sines, then its cosines, for theta 10000 whatever the model's.
    `embed_positions_for_gpt_attention` [1, positions * head_size]: (cosine, sine) of each frequency, position by position.
    `rotary_inv_freq` [head_size / 2].
    """

    name: str
    shape: tuple[int, ...]
    frequencies: tuple[float, ...]
    dtype: np.dtype = FLOAT32
    by_rows: ClassVar[bool] = True

    def block(self, region: Region) -> Block:
        return RopeBlock(self, region)


class RopeBlock(Block):
    """A region of a RopeBuffer, computed when it is read."""

    def __init__(self, buffer: RopeBuffer, region: Region) -> None:
        self.buffer, self.region = buffer, region
        self.shape, self.dtype = extent(region), buffer.dtype

    def read(self, region: Region) -> np.ndarray:
        """Compute the values of `region`, relative to the block: float32."""
        in_buffer = tuple((a + start, b + start) for (a, b), (start, _) in zip(region, self.region, strict=True))
        frequencies = np.array(self.buffer.frequencies, dtype=FLOAT32)
        with meter("rope", 4 * int(np.prod(extent(region)))):
            if self.buffer.name == "rotary_inv_freq":
                return frequencies[slices(in_buffer)]
            width = 2 * frequencies.size
            first, last = in_buffer[1]
            if self.buffer.name == "embed_positions_for_gpt_attention":
                first, last = first // width, -(-last // width)
            angles = np.arange(first, last, dtype=FLOAT32)[:, None] * frequencies
            if self.buffer.name == "embed_positions":
                return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)[None, :, slice(*in_buffer[2])]
            pairs = np.stack((np.cos(angles), np.sin(angles)), axis=-1).reshape(1, -1)
            return pairs[:, in_buffer[1][0] - first * width : in_buffer[1][1] - first * width]


def rope_buffers(model: ModelConfig) -> dict[TensorName, LazyTensor]:
    """Return the three buffers of a model by name."""
    size, positions = model.rotary_embedding_dim, model.max_position_embeddings
    plain = 1 / _powers(10000.0, size)
    scaled = tuple(scaled_frequencies(model).tolist())
    buffers = (
        RopeBuffer("rotary_inv_freq", (size // 2,), scaled),
        RopeBuffer("embed_positions", (1, positions, size), tuple(plain.tolist())),
        RopeBuffer("embed_positions_for_gpt_attention", (1, positions * size), scaled),
    )
    return {TensorName("", buffer.name): buffer for buffer in buffers}


def scaled_frequencies(model: ModelConfig) -> np.ndarray:
    """Return `rotary_inv_freq`, the inverse frequencies scaled by the model's `rotary_scaling`: float32 [rotary size / 2]."""
    powers = _powers(model.rotary_base, model.rotary_embedding_dim)
    scaling = model.rotary_scaling or {}
    kind = scaling_kind(scaling)
    if kind == "llama3":
        return _llama3((1 / powers).astype(FLOAT32), scaling)
    factor = float(scaling.get("factor", 1.0))
    # Kinds other than linear are multiplied by the factor, as NVIDIA's converter does.
    scale = 1 / factor if kind == "linear" else factor
    frequencies: np.ndarray = (FLOAT32.type(scale) / powers).astype(FLOAT32)
    return frequencies


def placements(name: TensorName, tensor: LazyTensor, parallelism: Parallelism) -> tuple[Placement, ...]:
    """Place the whole buffer on every rank."""
    region = whole(tensor.shape)
    return tuple(Placement(rank.index, str(name), region, region) for rank in parallelism.ranks())


def rank_tensors(tensors: Mapping[TensorName, LazyTensor], parallelism: Parallelism) -> tuple[RankTensor, ...]:
    """Return the buffers as tensors of every rank."""
    return tuple(
        RankTensor(rank.index, str(name), tensor.shape, "float32")
        for rank in parallelism.ranks()
        for name, tensor in tensors.items()
    )


def _powers(theta: float, size: int) -> np.ndarray:
    """Return theta ** (2 i / size) for each i: float32 [size / 2]."""
    powers: np.ndarray = (theta ** (np.arange(0, size, 2) / size)).astype(FLOAT32)
    return powers


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Scale frequencies as Llama 3.1 does: low ones by 1 / factor, high ones not at all, and those between smoothly."""
    factor, low = scaling.get("factor", 8.0), scaling.get("low_freq_factor", 1.0)
    high, original = scaling.get("high_freq_factor", 4.0), scaling.get("original_max_position_embeddings", 8192)
    result = []
    for frequency in frequencies.astype(np.float64).tolist():
        wavelength = 2 * np.pi / frequency
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result, dtype=FLOAT32)
