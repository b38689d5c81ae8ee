"""The rotary buffers equal whole-array formulas, in any pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipeline import convert
from pipeline.model.model_config import model_config
from pipeline.model.tables import find_family
from pipeline.tensor.names import TensorName
from stages.rope import rope_buffers
from tests.support import checkpoints

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, Any] = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
}


def inverse_frequencies(theta: float, size: int, scaling: dict[str, Any] | None) -> np.ndarray:
    powers = (theta ** (np.arange(0, size, 2) / size)).astype(np.float32)
    kind = (scaling or {}).get("type") or (scaling or {}).get("rope_type")
    if kind == "linear":
        return np.float32(1 / scaling["factor"]) / powers
    if kind == "dynamic":
        return np.float32(scaling["factor"]) / powers
    frequencies = np.float32(1) / powers
    if kind != "llama3":
        return frequencies
    result = []
    for f in frequencies.astype(np.float64):
        wavelength = 2 * np.pi / f
        if wavelength < 64 / 4.0:
            result.append(f)
        elif wavelength > 64 / 1.0:
            result.append(f / 8.0)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            result.append((1 - smooth) * f / 8.0 + smooth * f)
    return np.array(result, dtype=np.float32)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_files_hold_the_three_buffers_on_every_rank(scaling: str, tmp_path: Path) -> None:
    config = checkpoints.LLAMA | {"rope_scaling": SCALINGS[scaling], "rope_theta": 500000.0}
    checkpoints.write(tmp_path / "model", config)
    convert(
        model_dir=tmp_path / "model",
        output_dir=tmp_path / "out",
        tp_size=2,
        pp_size=2,
        scheduler="threads",
        write_rope_buffers=True,
        rope_scaling="keep",
    )
    size, positions = checkpoints.head_size(config), config["max_position_embeddings"]
    scaled = inverse_frequencies(500000.0, size, SCALINGS[scaling])
    plain = inverse_frequencies(10000.0, size, None)
    angles = np.arange(positions, dtype=np.float32)[:, None] * plain
    turned = np.arange(positions, dtype=np.float32)[:, None] * scaled
    for rank in range(4):
        held = load_file(tmp_path / f"out/rank{rank}.safetensors")
        np.testing.assert_array_equal(held["rotary_inv_freq"], scaled)
        np.testing.assert_array_equal(held["embed_positions"], np.concatenate((np.sin(angles), np.cos(angles)), axis=1)[None])
        pairs = np.stack((np.cos(turned), np.sin(turned)), axis=-1).reshape(1, -1)
        np.testing.assert_array_equal(held["embed_positions_for_gpt_attention"], pairs)


def test_they_are_written_only_on_request(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    convert(model_dir=tmp_path / "model", output_dir=tmp_path / "out", scheduler="threads")
    assert not {"rotary_inv_freq", "embed_positions"} & load_file(tmp_path / "out/rank0.safetensors").keys()


@given(data=st.data(), name=st.sampled_from(["rotary_inv_freq", "embed_positions", "embed_positions_for_gpt_attention"]))
def test_any_region_equals_that_of_the_whole(data: st.DataObject, name: str) -> None:
    family = find_family("huggingface", "LlamaForCausalLM")
    assert family
    model = model_config(checkpoints.LLAMA | {"rope_scaling": LLAMA3}, family, "LlamaForCausalLM", "config.json")
    buffer = rope_buffers(model)[TensorName("", name)]
    everything = np.asarray(buffer.block(tuple((0, n) for n in buffer.shape)))
    region = []
    for n in buffer.shape:
        start = data.draw(st.integers(0, n - 1))
        region.append((start, data.draw(st.integers(start + 1, n))))
    part = np.asarray(buffer.block(tuple(region)))
    # Vectorised sines differ in the last bit with the length of the array they run over.
    np.testing.assert_allclose(part, everything[tuple(slice(*axis) for axis in region)], rtol=0, atol=6e-8)
