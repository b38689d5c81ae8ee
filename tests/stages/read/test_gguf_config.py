"""read, GGUF: what the metadata and the tensors of rotary factors say of positions, as config.json would have it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import BadInput
from pipeline.tensor.tensors import LazyTensor
from stages.read.gguf_config import gguf_config
from tests.support.lazy import Held

SIZES = {"embedding_length": 64, "attention.head_count": 4, "context_length": 1024}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
SHORT, LONG = [1.0, 1.1], [1.0, 48.123]
FACTORS: dict[str, LazyTensor] = {
    f"rope_factors_{kind}.weight": Held(np.array(values, np.float32)) for kind, values in (("short", SHORT), ("long", LONG))
}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 256,
}


def config(keys: dict[str, Any], tensors: dict[str, LazyTensor] | None = None) -> dict[str, Any]:
    metadata = {f"qwen2.{key}": value for key, value in {**SIZES, **keys}.items()}
    return gguf_config(metadata, "qwen2", tensors or {}, Path("model.gguf"))


def test_keys_lose_the_prefix_of_their_own_architecture() -> None:
    metadata = {"qwen2.context_length": 8, "llama.context_length": 9, "general.name": "x", "tokenizer.ggml.tokens": ["a", "b"]}
    found = gguf_config(metadata, "qwen2", {}, Path("model.gguf"))
    assert found == {"context_length": 8, "vocab_size": 2, "attention.bias": False}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, {}),
        ({"rope.scaling.original_context_length": 256}, {"original_max_position_embeddings": 256}),
        ({"rope.scaling.yarn_beta_fast": 30.0, "rope.scaling.yarn_beta_slow": 2.0}, {"beta_fast": 30.0, "beta_slow": 2.0}),
        ({"rope.scaling.yarn_attn_factor": 1.3, "rope.scaling.yarn_ext_factor": 1.0}, {"attention_factor": 1.3}),
    ],
    ids=["factor", "length", "bands", "attention"],
)
def test_yarn(said: dict[str, Any], meant: dict[str, Any]) -> None:
    assert config({**YARN, **said})["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, **meant}


@pytest.mark.parametrize("key", ["yarn_ext_factor", "yarn_log_multiplier"])
def test_yarn_that_turns_otherwise_is_refused(key: str) -> None:
    with pytest.raises(BadInput, match=rf"rope\.scaling\.{key}: found 0\.5"):
        config({**YARN, f"rope.scaling.{key}": 0.5})


@pytest.mark.parametrize("kind", ["yarn", "longrope", "other"])
def test_a_scaling_that_lacks_what_it_needs_is_refused(kind: str) -> None:
    with pytest.raises(BadInput, match=rf"rope\.scaling\.type: found {kind}"):
        config({"rope.scaling.type": kind})


def test_factors_of_a_long_rope_are_the_numbers_that_were_meant() -> None:
    assert config({"rope.scaling.original_context_length": 256}, FACTORS)["rope_scaling"] == LONG_ROPE


@pytest.mark.parametrize("right", [True, False])
def test_the_factor_of_a_long_rope_is_left_out_where_it_is_the_formulas(right: bool) -> None:
    factor = math.sqrt(1 + math.log(4) / math.log(256)) if right else 1.19
    keys = {"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": float(np.float32(factor))}
    found = config(keys, FACTORS)["rope_scaling"]
    assert found == (LONG_ROPE if right else {**LONG_ROPE, "attention_factor": float(np.float32(factor))})


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0, float("nan")], [-1.0, 2.0]])
def test_factors_that_turn_nothing_are_refused(values: list[float]) -> None:
    tensors = {**FACTORS, "rope_factors_long.weight": Held(np.array(values, np.float32))}
    with pytest.raises(BadInput, match=r"rope_factors_long\.weight: found 2 factors .* one axis of factors greater than 0"):
        config({"rope.scaling.original_context_length": 256}, tensors)


@pytest.mark.parametrize("name", ["rope_freqs", "rope_factors_short", "rope_factors_long"])
@pytest.mark.parametrize("shape", [(), (1, 2), (2, 3)])
def test_factors_of_other_than_one_axis_are_refused(name: str, shape: tuple[int, ...]) -> None:
    tensors = {**FACTORS, f"{name}.weight": Held(np.ones(shape, np.float32))}
    with pytest.raises(BadInput, match=rf"{name}\.weight: found {math.prod(shape)} factors of shape"):
        config({"rope.scaling.original_context_length": 256}, tensors)


@pytest.mark.parametrize("name", FACTORS)
def test_one_list_of_factors_without_the_other_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=rf"{name}: found no such tensor"):
        config({"rope.scaling.original_context_length": 256}, {other: held for other, held in FACTORS.items() if other != name})


def test_factors_without_the_length_that_they_go_with_are_refused() -> None:
    with pytest.raises(BadInput, match=r"rope\.scaling\.original_context_length: found None"):
        config({}, FACTORS)


@pytest.mark.parametrize(
    ("keys", "share"),
    [
        ({"rope.dimension_count": 16}, 1.0),
        ({"rope.dimension_count": 12}, 0.75),
        ({"rope.dimension_count": 12, "attention.key_length": 24}, 0.5),
        ({}, None),
        ({"rope.dimension_count": "12"}, None),
        ({"rope.dimension_count": 12, "attention.head_count": [4, 2]}, None),
    ],
)
def test_the_share_of_a_head_that_is_turned(keys: dict[str, Any], share: float | None) -> None:
    assert config(keys).get("rope.share") == share
