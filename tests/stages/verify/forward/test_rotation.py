"""Positions are turned as transformers turns them, of every kind that TensorRT-LLM computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.errors import BadInput
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.rotation import Rotation
from stages.verify.forward.settings import DecoderSettings
from tests.end_to_end.test_family_forward import SIZES, TOLERANCE, Case, build, difference, old_style, ranks_of

SIZE, POSITIONS, BASE = 32, 4096, 50_000.0
CONFIG: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 99,
    "hidden_size": 4 * SIZE,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rotary_base": BASE,
    "max_position_embeddings": POSITIONS,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
}
LONG = {
    "architecture": "Phi3ForCausalLM",
    "hidden_act": "swiglu",
    "position_embedding_type": "long_rope",
    "original_max_position_embeddings": 16,
    "longrope_scaling_short_factors": [1.0 + n / 20 for n in range(SIZE // 2)],
    "longrope_scaling_long_factors": [1.0 + n for n in range(SIZE // 2)],
}


def rotation(scaling: dict[str, Any] | None = None, **more: Any) -> Rotation:
    return Rotation(DecoderSettings({**CONFIG, "rotary_scaling": scaling, **more}))


def agrees(scaling: dict[str, Any]) -> None:
    """Whether ours, under either name of the kind, are transformers' angles and magnitude."""
    heads = {"hidden_size": 4 * SIZE, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    config = LlamaConfig(**heads, rope_parameters={**scaling, "rope_theta": BASE})
    theirs, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    for ours in (rotation(scaling), rotation(old)):
        np.testing.assert_allclose(ours.inverse_frequencies(100), theirs.numpy(), rtol=1e-5)
        assert ours.magnitude(100) == pytest.approx(magnitude, rel=1e-6)


factors = st.floats(1.0, 64.0)
trained = st.sampled_from([256, 1024, 4096, 8192])


@given(factor=factors)
def test_linear(factor: float) -> None:
    agrees({"rope_type": "linear", "factor": factor})


@given(factor=factors, low=st.floats(0.5, 2.0), more=st.floats(0.5, 8.0), original=trained)
def test_llama3(factor: float, low: float, more: float, original: int) -> None:
    bands = {"low_freq_factor": low, "high_freq_factor": low + more, "original_max_position_embeddings": original}
    agrees({"rope_type": "llama3", "factor": factor, **bands})


def test_llama3_of_meta_has_no_numbers() -> None:
    """What params.json's use_scaled_rope becomes: the defaults are Llama 3.1's."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain, given_ = rotation({"type": "llama3"}), rotation({"rope_type": "llama3", "factor": 8.0, **bands})
    assert np.array_equal(plain.inverse_frequencies(9), given_.inverse_frequencies(9))
    assert not np.array_equal(plain.inverse_frequencies(9), rotation().inverse_frequencies(9))


@given(
    factor=factors,
    original=trained,
    slow=st.floats(0.5, 4.0),
    fast=st.floats(8.0, 64.0),
    scales=st.one_of(st.none(), st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0))),
)
def test_yarn(factor: float, original: int, slow: float, fast: float, scales: tuple[float, float] | None) -> None:
    magnitudes = {} if scales is None else {"mscale": scales[0], "mscale_all_dim": scales[1]}
    bands = {"original_max_position_embeddings": original, "beta_slow": slow, "beta_fast": fast}
    agrees({"rope_type": "yarn", "factor": factor, **bands, **magnitudes})


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED: dict[str, dict[str, Any]] = {
    "rotary_scaling: found 'longrope'": {"rotary_scaling": {"type": "longrope", "factor": 2.0}},
    "rotary_scaling: found 'linear'": {"rotary_scaling": {"type": "linear", "factor": 2.0}, **LONG},
    "rotary_scaling: found 'default'": {"rotary_scaling": {"rope_type": "default"}},
    "rotary_scaling: found rope_type 'llama3', type 'linear'": {
        "rotary_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}
    },
    "rotary_scaling.alpha: found dynamic without it": {"rotary_scaling": {"type": "dynamic", "factor": 2.0}},
    "rotary_scaling.type: found 'dynamic'": {"rotary_scaling": {"type": "dynamic", "alpha": 1000.0}},
    "rotary_scaling.truncate": {"rotary_scaling": {**YARN, "truncate": False}},
    "rotary_scaling.original_max_position_embeddings": {"rotary_scaling": {"type": "yarn", "factor": 4.0}},
    "rotary_scaling.attention_factor": {"rotary_scaling": {**YARN, "attention_factor": 1.5}},
    "rotary_scaling.mscale": {"rotary_scaling": {**YARN, "mscale": 0.5}},
    "longrope_scaling_long_factors: found nothing": {**LONG, "longrope_scaling_long_factors": None},
    "rope_local_base_freq: found nothing": {"architecture": "Gemma3ForCausalLM", "hidden_act": "gelu"},
    "position_embedding_type": {"position_embedding_type": "alibi"},
}


@pytest.mark.parametrize("subject", REFUSED)
def test_what_is_not_the_same_in_both_is_refused_by_name(subject: str) -> None:
    config = {**CONFIG, **REFUSED[subject]}
    with pytest.raises(BadInput, match=f"config.json: {subject}"):
        Rotation(DecoderSettings(config))


def test_an_attention_factor_that_yarn_has_in_any_case() -> None:
    rotation({**YARN, "attention_factor": 0.1 * np.log(4.0) + 1})


@pytest.mark.parametrize("more", [{}, {"rotary_scaling": YARN}, LONG, {"rotary_embedding_dim": 8}, {"rotary_pct": 0.25}], ids=str)
def test_scores_depend_on_distances(more: dict[str, Any]) -> None:
    """Up to the magnitude; what is not turned stays as it is."""
    ours, generator = rotation(**more), torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 1, SIZE, generator=generator) for _ in range(2))
    if "rotary_scaling" not in more and more is not LONG:
        rest = 8 if more else SIZE
        assert ours.rotate(q, 11, 14)[..., rest:].equal(q[..., rest:])
        assert not torch.isclose(ours.rotate(q, 11, 14)[..., :rest], q[..., :rest]).any()
    scores = [(ours.rotate(q, at + 3, 14) * ours.rotate(k, at, 14)).sum(-1) for at in (0, 5, 10)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-4, atol=1e-5)
    assert not torch.isclose((ours.rotate(q, 4, 14) * ours.rotate(k, 0, 14)).sum(-1), scores[0]).any()


def test_long_rope_is_another_behind_the_trained_length() -> None:
    ours = rotation(**LONG)
    assert [ours.changes(a, b) for a, b in ((0, 16), (3, 16), (16, 17), (0, 17), (17, 40))] == [False, False, True, True, False]
    assert not rotation().changes(16, 17)


def test_partial_frequencies_span_what_is_turned() -> None:
    assert len(rotation(rotary_pct=0.25).inverse_frequencies(9)) == SIZE // 8
    np.testing.assert_allclose(rotation(rotary_embedding_dim=8).inverse_frequencies(9), BASE ** -(np.arange(4) / 4), rtol=1e-6)


SCALED: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize("style", ["new", "old", "type"])
@pytest.mark.parametrize("name", SCALED)
def test_converted_models_with_scaled_positions(name: str, style: str, tmp_path: Path) -> None:
    model = build(Case(LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**SCALED[name], "rope_theta": 500.0}}))
    model.save_pretrained(tmp_path / "model")
    if style != "new":
        config = old_style(json.loads((tmp_path / "model/config.json").read_text()))
        if style == "type":
            config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    output = ranks_of(tmp_path / "model", tmp_path / "ranks", "tp2")
    tokens = torch.randint(SIZES["vocab_size"], (60,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    decoder = Decoder(open_checkpoint(output))
    assert difference(decoder.logits(tokens), theirs) < TOLERANCE
    written = json.loads((output / "config.json").read_text())
    assert written["rotary_scaling"]["factor"] == SCALED[name]["factor"]
    plain = Decoder(open_checkpoint(output))
    plain._attention.rotation.kind = None
    assert difference(plain.logits(tokens), theirs) > 100 * TOLERANCE, "the scaling is seen"
