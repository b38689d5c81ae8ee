"""Texts in the place of tokens: what the checkpoint's own tokenizer makes of them, cut into samples."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.commands import headrace
from tests.support.places import DATA

WORDS = ["<unk>", "</s>", "rivers", "turn", "wheels", "slowly"]
TEXTS = ["rivers turn wheels", "", "wheels turn slowly", "rivers"]
IDS = [2, 3, 4, 1, 4, 3, 5, 1, 2, 1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "smoothquant" / "models" / "q_bf16", tmp_path / "model")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def written(folder: Path, kind: str) -> Path:
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "article": TEXTS}), folder / "texts.parquet", row_group_size=2)
        return folder / "texts.parquet"
    lines = [json.dumps({kind: text}) for text in TEXTS] if kind != "lines" else TEXTS
    path = folder / ("texts.txt" if kind == "lines" else "texts.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return path


def calibrated(model: Path, output: Path, *more: object) -> bytes:
    ran = headrace("calibrate", model, "--output", output, *more)
    assert ran.code == 0, ran
    return output.read_bytes().split(b"}", 1)[1]  # without what its header says of it


@pytest.mark.parametrize("kind", ["lines", "text", "article", "content", "parquet"])
def test_samples_are_cut_of_all_texts(kind: str, model: Path, tmp_path: Path) -> None:
    save_file({"input_ids": np.array(IDS[:9]).reshape(3, 3)}, tmp_path / "tokens")
    by_tokens = calibrated(model, tmp_path / "a", "--calibration_tokens", tmp_path / "tokens")
    by_texts = calibrated(model, tmp_path / "b", "--calib_dataset", written(tmp_path, kind), "--calib_max_seq_length", 3)
    assert by_tokens == by_texts
    fewer = calibrated(
        model, tmp_path / "c", "--calib_dataset", written(tmp_path, kind), "--calib_max_seq_length", 3, "--calib_size", 1
    )
    assert fewer != by_texts


REFUSED = {
    "too few": ("a.txt", "rivers", "--calib_dataset", "2 tokens"),
    "no object": ("a.jsonl", '["rivers"]', "line 1", "a line without one"),
    "no JSON": ("a.jsonl", '{"text": "rivers"}\n{"text', "line 2", "what is no text"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_texts_that_are_none(what: str, model: Path, tmp_path: Path) -> None:
    name, content, *said = REFUSED[what]
    (tmp_path / name).write_text(content)
    ran = headrace("calibrate", model, "--output", tmp_path / "ranges", "--calib_dataset", tmp_path / name)
    assert ran.code == 2
    assert all(each in ran.err for each in said), ran.err


def test_parquet_that_has_no_texts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        ran = headrace("calibrate", model, "--output", tmp_path / "ranges", "--calib_dataset", path)
        assert ran.code == 2, ran
        return ran.err

    parquet.write_table(pyarrow.table({"id": [1], "words": ["rivers"]}), tmp_path / "a.parquet")
    assert "a.parquet: found columns id, words; expected Parquet with a column of texts: text or article" in refused(
        tmp_path / "a.parquet"
    )
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    assert "b.parquet: text: found values of type int; expected texts" in refused(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    assert "c.parquet: found no Parquet that can be read" in refused(tmp_path / "c.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'headrace[calibrate]'" in refused(tmp_path / "a.parquet")


def test_one_of_the_two(model: Path, tmp_path: Path) -> None:
    ran = headrace("calibrate", model, "--output", tmp_path / "ranges")
    assert ran.code == 2
    assert "--calibration_tokens: found nothing" in ran.err
    tokens = ("--calibration_tokens", model / "calibration_tokens.safetensors")
    ran = headrace("calibrate", model, "--output", tmp_path / "ranges", *tokens, "--calib_dataset", written(tmp_path, "text"))
    assert ran.code == 2
    assert "--calib_dataset too" in ran.err
    ran = headrace("calibrate", model, "--output", tmp_path / "ranges", "--calib_dataset", tmp_path / "nowhere")
    assert ran.code == 2
    assert "nowhere" in ran.err
