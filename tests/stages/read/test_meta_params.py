"""What Meta's params.json says, leaves out and means: sizes, rope and its scaling, windows, and the options beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import convert, plan
from pipeline.errors import BadInput
from pipeline.model.model_config import model_config
from pipeline.model.tables import find_family
from pipeline.model.unsaid import fill_in
from stages.read import open_source
from stages.verify.roundtrip.original.config import canonical_config
from tests.stages.read.test_meta import BF16, ODD, Models, config_of, ranks
from tests.stages.read.test_meta import model as model
from tests.stages.read.test_meta import models as models
from tests.support import checkpoints, meta_files
from tests.support.commands import headrace


def planned(directory: Path, **changed: Any) -> dict[str, Any]:
    """config.json of a plan of a model whose params.json has other values: None takes a key away."""
    file = directory / "params.json"
    params = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({key: value for key, value in params.items() if value is not None}))
    return json.loads(plan(meta_ckpt_dir=directory, output_dir=directory.parent / "out").targets[0].output.config)


@pytest.mark.parametrize("vocab_size", [-1, None])
@pytest.mark.parametrize("vocabulary", [False, True], ids=["llama2", "llama3"])
def test_the_vocabulary_is_the_embeddings_rows_where_it_is_not_given(
    vocab_size: int | None, vocabulary: bool, tmp_path: Path
) -> None:
    model = meta_files.write(tmp_path / "model", ODD, checkpoints.values(ODD), 4, vocabulary=vocabulary)
    assert planned(model, vocab_size=vocab_size)["vocab_size"] == 90


# (multiple_of, ffn_dim_multiplier) -> the rows of w1 of a model of 64 columns, worked out by hand: 8 * 64 / 3 = 170.66.
FFN = {(32, None): 192, (32, 1): 192, (160, 0.9): 160, (None, None): 256, (1, 1.3): 221, (17, 1.0): 170}


@pytest.mark.parametrize(("multiple", "factor"), FFN)
def test_hidden_dim_is_worked_out_as_metas_code_does(multiple: int | None, factor: float | None, tmp_path: Path) -> None:
    config = {**BF16, "intermediate_size": FFN[multiple, factor]}
    model = meta_files.write(tmp_path / "model", config, checkpoints.values(config))
    written = planned(model, hidden_dim=None, multiple_of=multiple, ffn_dim_multiplier=factor)
    assert written["intermediate_size"] == config["intermediate_size"]


PUBLISHED = {
    "Llama 2 7B": ({"dim": 4096, "multiple_of": 256}, 11008),
    "Llama 2 13B": ({"dim": 5120, "multiple_of": 256}, 13824),
    "Llama 2 70B": ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    "Llama 3 8B": ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    "Llama 3.1 405B": ({"dim": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hidden_dim_of_published_models(name: str, tmp_path: Path) -> None:
    # Opening does not compare sizes with tensors, so that these need not be as large.
    values, rows = PUBLISHED[name]
    meta_files.save(tmp_path / "model", values, meta_files.shares(BF16, checkpoints.values(BF16)))
    assert open_source(tmp_path / "model").config["hidden_dim"] == rows


def test_without_kv_heads_every_head_has_its_own(tmp_path: Path) -> None:
    config = {**BF16, "num_key_value_heads": 8}
    model = meta_files.write(tmp_path / "model", config, checkpoints.values(config), 2)
    assert planned(model, n_kv_heads=None)["num_key_value_heads"] == 8


def test_rope(model: Path) -> None:
    absent = planned(model, rope_theta=None)
    assert (absent["rotary_base"], type(absent["rotary_base"]), absent["rotary_scaling"]) == (10000, int, None)
    given = planned(model, rope_theta=500000.0, use_scaled_rope=True)
    assert (given["rotary_base"], given["rotary_scaling"]) == (500000.0, {"type": "llama3"})
    assert planned(model, use_scaled_rope=False)["rotary_scaling"] is None


def test_scaled_rope_has_llama_3_1s_buffers(tmp_path: Path) -> None:
    # Of the scaling's parameters params.json says nothing: they are those that Hugging Face's config.json spells out.
    bands = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = {**BF16, "max_position_embeddings": 2048, "rope_theta": 500000.0}
    meta_files.write(tmp_path / "meta", config, checkpoints.values(config))
    params = {**meta_files.params(config), "use_scaled_rope": True}
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    checkpoints.write(tmp_path / "hf", {**config, "rope_scaling": {"rope_type": "llama3", **bands}})
    options = {"dtype": "bfloat16", "scheduler": "threads", "write_rope_buffers": True}
    convert(meta_ckpt_dir=tmp_path / "meta", output_dir=tmp_path / "ours", **options)
    convert(model_dir=tmp_path / "hf", output_dir=tmp_path / "theirs", **options)
    assert ranks(tmp_path / "ours") == ranks(tmp_path / "theirs")


BANDS = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What params.json says -> max_position_embeddings, the factor (0: none is written, -1: no scaling at all), the note's words.
TOLD: dict[str, tuple[dict[str, Any], int, float, str]] = {
    "3.2 1B": (
        {"use_scaled_rope": True, "dim": 2048, "n_layers": 16},
        131072,
        32.0,
        "Llama 3.2 1B's, by use_scaled_rope true, dim",
    ),
    "3.2 3B": ({"use_scaled_rope": True, "dim": 3072, "n_layers": 28}, 131072, 32.0, "Llama 3.2 3B's"),
    "3.1 8B": ({"use_scaled_rope": True, "dim": 4096, "n_layers": 32}, 131072, 8.0, "Llama 3.1 8B's"),
    "3.3 70B": ({"use_scaled_rope": True, "dim": 8192, "n_layers": 80}, 131072, 8.0, "Llama 3.1 70B's"),
    "3.1 405B": ({"use_scaled_rope": True, "dim": 16384, "n_layers": 126}, 131072, 8.0, "Llama 3.1 405B's"),
    "3.1 by its vocabulary": (
        {"use_scaled_rope": True, "vocab_size": 128256},
        131072,
        8.0,
        "Llama 3.1's, by use_scaled_rope true, voc",
    ),
    "3": ({"vocab_size": 128256}, 8192, -1, "Llama 3's, by vocab_size 128256 in params.json"),
    "3, not scaled": ({"vocab_size": 128256, "use_scaled_rope": False}, 8192, -1, "Llama 3's"),
    "2 7B": ({"dim": 4096, "n_layers": 32, "vocab_size": 32000}, 2048, -1, "params.json says neither it nor which model this is"),
    "scaled, of another size": ({"use_scaled_rope": True}, 2048, 0, "params.json says neither it nor which model this is"),
    "scaled by a factor of its own": ({"use_scaled_rope": True, "rope_scaling_factor": 16, "vocab_size": 128256}, 131072, 16.0, ""),
    "Mistral's first": (
        {"sliding_window": 4096, "dim": 4096, "n_layers": 32},
        32768,
        -1,
        "Mistral 7B v0.1's, by sliding_window 4096",
    ),
    "long by itself": ({"vocab_size": 128256, "max_position_embeddings": 32768}, 32768, -1, ""),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_params_json_tells_of_published_models(name: str) -> None:
    values, positions, factor, words = TOLD[name]
    params = {**meta_files.params(BF16), **values}
    if params.get("use_scaled_rope"):
        params["rope_scaling"] = {"type": "llama3"}
    family = find_family("meta", "LlamaForCausalLM")
    assert family
    filled = fill_in(params, family, "/models/m/params.json", {})
    assert not filled.problems
    model = model_config(filled.config, family, "LlamaForCausalLM", "params.json")
    assert model.max_position_embeddings == positions
    expected = {-1: None, 0: {"type": "llama3"}}.get(factor, {**BANDS, "factor": factor})
    assert model.rotary_scaling == expected
    noted = [note for note in filled.notes if note.startswith("max_position_embeddings")]
    assert bool(noted) == ("max_position_embeddings" not in values)
    assert all(words in note and note.endswith("; --max_position_embeddings says another") for note in noted)
    scaled = [note for note in filled.notes if "rope_scaling_factor" in note]
    assert bool(scaled) == (factor >= 0 and "rope_scaling_factor" not in values)
    assert all(words in note and note.endswith("; --rope_scaling_factor says another") for note in scaled)
    assert len(filled.notes) == len(noted) + len(scaled)


# Llama 3.2's 1B in width and layers, and small in all else: 0.3 GB that take no disk.
ONE_B = {**BF16, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
ONE_B |= {"intermediate_size": 64, "rope_theta": 500000.0}


def test_llama_3_2s_1b_has_its_own_factor_in_config_json_and_the_plan(tmp_path: Path) -> None:
    source = {name: np.broadcast_to(np.zeros(1, np.float16), shape) for name, shape in checkpoints.shapes(ONE_B).items()}
    with torch.serialization.skip_data():
        meta_files.write(tmp_path / "model", ONE_B, source)
    written = planned(tmp_path / "model", use_scaled_rope=True)
    assert (written["max_position_embeddings"], written["rotary_scaling"]) == (131072, {**BANDS, "factor": 32.0})
    ran = headrace("plan", "--meta_ckpt_dir", tmp_path / "model", "--output_dir", tmp_path / "out", "--json")
    subjects = [note.partition(":")[0] for note in json.loads(ran.out)["notes"] if "in the last" not in note]
    assert subjects == ["max_position_embeddings 131072", "rope_scaling_factor 32.0"]
    # Its verification tells the factor by itself.
    assert canonical_config(open_source(tmp_path / "model"))["rope_scaling"] == {**BANDS, "factor": 32.0}


def test_the_options_go_before_all_else(model: Path) -> None:
    assert planned(model, use_scaled_rope=True)["rotary_scaling"] == {"type": "llama3"}
    output = model.parent / "out"
    options = {"max_position_embeddings": 65536, "rope_scaling_factor": 4}
    made = plan(meta_ckpt_dir=model, output_dir=output, **options)
    config = json.loads(made.targets[0].output.config)
    assert (config["max_position_embeddings"], config["rotary_scaling"]) == (65536, {**BANDS, "factor": 4.0})
    assert not [note for note in made.notes if "rope" in note or "position" in note]
    assert made.id != plan(meta_ckpt_dir=model, output_dir=output).id
    words = ("--meta-ckpt-dir", model, "--output-dir", output, "--scheduler", "threads", "--rope-scaling-factor", "4")
    assert headrace("convert", *words, "--max-position-embeddings", "65536", "--n_positions", 65536).code == 0
    assert config_of(output) == config
    # transformers computes with the factor that the conversion was told.
    assert headrace("verify", output, "--source", model, "--logits", "--tokens", 9).code == 0
    pasted = headrace("plan", *words, "--n_positions", 8192)
    assert "--n_positions 8192: found max_position_embeddings 2048 in" in pasted.err
    assert "or give --max_position_embeddings 8192" in pasted.err


MISTRAL = {**BF16, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 16}


def test_mistral_s_own_files_keep_their_window_and_the_size_of_a_head(tmp_path: Path) -> None:
    model, output = meta_files.write(tmp_path / "model", MISTRAL, checkpoints.values(MISTRAL), 2), tmp_path / "out"
    config = planned(model, sliding_window=5, head_dim=16, max_position_embeddings=64)
    assert (config["head_size"], config["runtime_defaults"]) == (16, {"max_attention_window": [5]})
    # transformers computes with the window, which a LLaMA has not.
    assert canonical_config(open_source(model))["architectures"] == ["MistralForCausalLM"]
    assert headrace("convert", "--meta_ckpt_dir", model, "--output_dir", output, "--scheduler", "threads").code == 0
    assert headrace("verify", output, "--source", model, "--logits", "--tokens", 9).code == 0
    (output / "config.json").write_text(json.dumps({**config_of(output), "runtime_defaults": None}))
    ran = headrace("verify", output, "--source", model)
    assert (ran.code, "max_attention_window: found none" in ran.out + ran.err) == (5, True)


def test_a_window_of_a_model_whose_length_is_not_known_is_not_lost(model: Path) -> None:
    assert planned(model, sliding_window=2047)["runtime_defaults"] == {"max_attention_window": [2047]}
    with pytest.raises(BadInput, match=r"sliding_window: found 4096; .* not within 2048 tokens. Give --max_position_embeddings"):
        planned(model, sliding_window=4096)
    made = plan(meta_ckpt_dir=model, output_dir=model.parent / "out", max_position_embeddings=8192)
    assert json.loads(made.targets[0].output.config)["runtime_defaults"] == {"max_attention_window": [4096]}
    assert planned(model, sliding_window=None)["runtime_defaults"] is None


def test_options_that_a_source_has_no_use_for(model: Path, models: Models) -> None:
    output = model.parent / "out"
    ran = headrace("plan", "--meta_ckpt_dir", model, "--output_dir", output, "--rope_scaling_factor", 8)
    assert (ran.code, "--rope_scaling_factor 8.0: found no scaling in" in ran.err) == (2, True)
    own = models.huggingface(BF16)
    for flags, found in ((("--max_position_embeddings", 256), "found 128 in"), (("--rope_scaling_factor", 8), "found none in")):
        ran = headrace("plan", "--model_dir", own, "--output_dir", output, *flags)
        assert (ran.code, found in ran.err) == (2, True), ran
    assert headrace("plan", "--model_dir", own, "--output_dir", output, "--max_position_embeddings", 128).code == 0
    params = json.loads((model / "params.json").read_text())
    (model / "params.json").write_text(json.dumps({**params, "use_scaled_rope": True, "rope_scaling_factor": "8"}))
    ran = headrace("plan", "--meta_ckpt_dir", model, "--output_dir", output)
    assert (ran.code, "rope_scaling_factor: found '8'; expected a number greater than 0" in ran.err) == (2, True)
