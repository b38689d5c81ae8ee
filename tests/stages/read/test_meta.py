"""Meta's checkpoints convert to the bytes of the same model as a Hugging Face directory, however many parts it came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import convert, plan
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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return meta_files.write(tmp_path / "model", BF16, checkpoints.values(BF16), 2)


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
