"""Meta's checkpoints convert to the bytes of the same model as a Hugging Face directory, however many parts it came in."""

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
from tests.end_to_end.test_memory import peak
from tests.pipeline.run.test_blocks import cut
from tests.support import checkpoints, meta_files
from tests.support.commands import headrace
from tests.support.directories import contents

BF16 = {**checkpoints.LLAMA, "torch_dtype": "bfloat16"}
# 90 rows of vocabulary: neither the parts nor the ranks divide them.
ODD = {**BF16, "vocab_size": 90}
WIDE_HEADS = {**BF16, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128}


def ranks(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name.startswith("rank")}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


class Models:
    """The models of this file's tests, each written once in each form, and the conversions of their Hugging Face forms."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Path] = {}

    def huggingface(self, config: dict[str, Any]) -> Path:
        return self._once(["hf", config], lambda path: checkpoints.write(path, config))

    def meta(self, config: dict[str, Any], parts: int, **style: Any) -> Path:
        source = checkpoints.values(config)
        return self._once(["meta", config, parts, style], lambda path: meta_files.write(path, config, source, parts, **style))

    def expected(self, config: dict[str, Any], **options: Any) -> dict[str, bytes]:
        model = self.huggingface(config)
        job = {"dtype": "bfloat16", "scheduler": "threads", **options}
        return ranks(self._once(["ranks", config, job], lambda path: convert(model_dir=model, output_dir=path, **job)))

    def _once(self, key: Any, make: Any) -> Path:
        path = self.known.get(json.dumps(key))
        if path is None:
            path = self.known[json.dumps(key)] = self.folder / str(len(self.known))
            make(path)
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("meta"))


def check(models: Models, config: dict[str, Any], model: Path, output: Path, **options: Any) -> None:
    convert(meta_ckpt_dir=model, output_dir=output, dtype="bfloat16", scheduler="threads", **options)
    assert ranks(output) == models.expected(config, **options)


# tp 8 is more ranks than there are kv heads; 8 parts cut through the heads.
@pytest.mark.parametrize("vocabulary", [False, True], ids=["llama2", "llama3"])
@pytest.mark.parametrize("pp_size", [1, 2])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_any_parts_on_any_ranks(models: Models, parts: int, tp_size: int, pp_size: int, vocabulary: bool, tmp_path: Path) -> None:
    model = models.meta(ODD, parts, vocabulary=vocabulary)
    check(models, ODD, model, tmp_path / "out", tp_size=tp_size, pp_size=pp_size)


@pytest.mark.parametrize("vocabulary", [False, True], ids=["llama2", "llama3"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("parts", "tp_size"), [(1, 4), (2, 2), (2, 8), (4, 1), (8, 2)])
def test_parallel_embeddings(models: Models, parts: int, tp_size: int, dim: int, vocabulary: bool, tmp_path: Path) -> None:
    model = models.meta(ODD, parts, vocabulary=vocabulary)
    check(models, ODD, model, tmp_path / "out", tp_size=tp_size, use_parallel_embedding=True, embedding_sharding_dim=dim)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("parts", [1, 4])
def test_parts_that_are_directories(models: Models, parts: int, files: int, tmp_path: Path) -> None:
    model = models.meta(BF16, parts, files=files, vocabulary=True)
    assert sum(path.is_dir() for path in model.iterdir()) == parts
    check(models, BF16, model, tmp_path / "out", tp_size=2)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_any_number_of_kv_heads(models: Models, heads: int, tmp_path: Path) -> None:
    config = {**WIDE_HEADS, "num_key_value_heads": heads}
    check(models, config, models.meta(config, 4, vocabulary=True), tmp_path / "out", tp_size=4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_type_is_bfloat16_unless_asked_whatever_the_files_hold(models: Models, dtype: str, tmp_path: Path) -> None:
    config = {**BF16, "torch_dtype": dtype}
    model = models.meta(config, 2)
    convert(meta_ckpt_dir=model, output_dir=tmp_path / "auto", scheduler="threads")
    assert ranks(tmp_path / "auto") == models.expected(config)
    assert config_of(tmp_path / "auto")["dtype"] == "bfloat16"
    convert(meta_ckpt_dir=model, output_dir=tmp_path / "asked", dtype=dtype, scheduler="threads")
    assert ranks(tmp_path / "asked") == models.expected(config, dtype=dtype)


def test_several_targets_and_cuts(models: Models, tmp_path: Path) -> None:
    model = models.meta(ODD, 4)
    target = [{"output_dir": tmp_path / str(tp), "tp_size": tp} for tp in (1, 8)]
    convert(meta_ckpt_dir=model, target=target, scheduler="threads", scratch_after="read,rename,shard")
    for tp in (1, 8):
        assert ranks(tmp_path / str(tp)) == models.expected(ODD, tp_size=tp)


def test_blocks_and_pieces_of_any_size(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their ends lie inside parts, and parts inside them.
    for number, (block_bytes, piece_bytes) in enumerate([(1000, 1), (3000, 700), (50_000, 1000)]):
        cut(monkeypatch, block_bytes, piece_bytes)
        for vocabulary in (False, True):
            model = models.meta(ODD, 4, vocabulary=vocabulary)
            check(models, ODD, model, tmp_path / f"{number}{vocabulary}", tp_size=8, pp_size=2, use_parallel_embedding=True)


# 400 MB of bf16 in 4 parts.
LARGE = {**BF16, "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 4}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(False, "bfloat16"), (True, "float16")], ids=["llama2", "llama3"])
def test_memory_is_bounded_by_the_setting(vocabulary: bool, dtype: str, tmp_path: Path) -> None:
    source = {name: np.broadcast_to(np.zeros(1, np.float16), shape) for name, shape in checkpoints.shapes(LARGE).items()}
    with torch.serialization.skip_data():  # space for the values, and no bytes: files that take no disk
        meta_files.write(tmp_path / "model", LARGE, source, 4, vocabulary=vocabulary)
    limit = 200 << 20
    options = {"tp_size": 2, "dtype": dtype, "scheduler": "threads", "workers": 2, "memory_limit": limit}
    measured = peak(meta_ckpt_dir=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), **options)
    assert measured["peak"] <= measured["projected"] <= limit < measured["written"]


def test_the_configuration_is_that_of_the_same_model_but_for_what_params_json_does_not_say(models: Models, tmp_path: Path) -> None:
    convert(meta_ckpt_dir=models.meta(BF16, 2), output_dir=tmp_path / "meta", tp_size=2, scheduler="threads")
    convert(model_dir=models.huggingface(BF16), output_dir=tmp_path / "hf", tp_size=2, scheduler="threads")
    ours, theirs = config_of(tmp_path / "meta"), config_of(tmp_path / "hf")
    assert theirs.pop("tie_word_embeddings") is False
    assert theirs["moe"]["normalization_mode"] is None
    assert ours == {**theirs, "max_position_embeddings": 2048, "moe": {**theirs["moe"], "normalization_mode": 1}}
    assert list(ours) == list(theirs)
    assert (ours["architecture"], ours["dtype"], ours["hidden_act"]) == ("LlamaForCausalLM", "bfloat16", "silu")


def planned(directory: Path, **changed: Any) -> dict[str, Any]:
    """config.json of a plan of a model whose params.json has other values: None takes a key away."""
    file = directory / "params.json"
    params = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({key: value for key, value in params.items() if value is not None}))
    return json.loads(plan(meta_ckpt_dir=directory, output_dir=directory.parent / "out").targets[0].output.config)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return meta_files.write(tmp_path / "model", BF16, checkpoints.values(BF16), 2)


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


@pytest.mark.parametrize("vocabulary", [False, True], ids=["llama2", "llama3"])
@pytest.mark.parametrize("parts", [1, 4])
def test_without_an_output_the_embeddings_are_tied(models: Models, parts: int, vocabulary: bool, tmp_path: Path) -> None:
    config = {**ODD, "tie_word_embeddings": True}
    model = models.meta(config, parts, vocabulary=vocabulary)
    check(models, config, model, tmp_path / "out", tp_size=4, pp_size=2)
    assert "tie_word_embeddings" not in config_of(tmp_path / "out")


# LLaMA 2's file has them once, LLaMA 1's in each layer.
@pytest.mark.parametrize("names", [["rope.freqs"], [f"layers.{n}.attention.inner_attention.rope.freqs" for n in range(3)]])
def test_rope_freqs_are_left_out_even_where_parts_disagree(names: list[str], model: Path, tmp_path: Path) -> None:
    tensors = meta_files.shares(BF16, checkpoints.values(BF16), 2)
    for number, part in enumerate(tensors):
        part |= {name: np.full(4, number, np.float32) for name in names}
    meta_files.save(tmp_path / "more", meta_files.params(BF16), tensors)
    for source, name in ((model, "plain"), (tmp_path / "more", "out")):
        convert(meta_ckpt_dir=source, output_dir=tmp_path / name, scheduler="threads")
    assert ranks(tmp_path / "out") == ranks(tmp_path / "plain")


def test_files_that_hold_views_of_one_storage(tmp_path: Path) -> None:
    # Saved by a program that cut them from whole tensors without a copy: each file then holds the whole.
    whole = {name: meta_files.tensor(array) for name, array in meta_files.shares(BF16, checkpoints.values(BF16))[0].items()}
    meta_files.write(tmp_path / "model", BF16, checkpoints.values(BF16), 2)
    for number in (0, 1):
        path = tmp_path / "model" / f"consolidated.{number:02}.pth"
        cut = {name: share.shape for name, share in torch.load(path).items()}
        views = {}
        for name, shape in cut.items():
            axis = next((axis for axis, (a, b) in enumerate(zip(shape, whole[name].shape, strict=True)) if a != b), None)
            views[name] = whole[name] if axis is None else whole[name].narrow(axis, number * shape[axis], shape[axis])
        torch.save(views, path)
    convert(meta_ckpt_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=2, scheduler="threads")
    checkpoints.write(tmp_path / "hf", BF16)
    convert(model_dir=tmp_path / "hf", output_dir=tmp_path / "expected", tp_size=2, scheduler="threads")
    assert ranks(tmp_path / "out") == ranks(tmp_path / "expected")


def test_a_meta_directory_as_model_dir_is_recognised(model: Path, tmp_path: Path) -> None:
    for flag, name in (("--model_dir", "one"), ("--meta_ckpt_dir", "other")):
        ran = headrace("convert", flag, model, "--output_dir", tmp_path / name, "--scheduler", "threads", "--tp_size", 2)
        assert ran.code == 0, ran.err
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    summary = plan(model_dir=model, output_dir=tmp_path / "one", tp_size=2).summary()
    assert summary["source"]["kind"] == "Meta checkpoint (2 parts)"
    assert summary["source"]["family"] == "meta_llama"
    assert summary["targets"][0]["up_to_date"], "the two flags mean the same conversion"


def test_a_job_file_names_it_relative_to_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.toml").write_text("meta_ckpt_dir = 'model'\noutput_dir = 'out'\nscheduler = 'threads'\n")
    monkeypatch.chdir(model)
    assert headrace("convert", "../job.toml").code == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_second_conversion_is_up_to_date_until_a_part_changes(model: Path, tmp_path: Path) -> None:
    options = {"meta_ckpt_dir": model, "output_dir": tmp_path / "out", "scheduler": "threads"}
    convert(**options)
    assert convert(**options).up_to_date
    meta_files.write(model, BF16, checkpoints.values(BF16, seed=1), 2)
    assert not plan(**options).up_to_date


def test_the_tokenizer_is_copied(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"\0pieces")
    convert(meta_ckpt_dir=model, output_dir=tmp_path / "out", scheduler="threads", copy_tokenizer=True)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\0pieces"
