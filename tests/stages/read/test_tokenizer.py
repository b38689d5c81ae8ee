"""A checkpoint's tokenizer: what transformers cannot open is a problem, whatever it raises, and its settings stay as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.utils import logging

from pipeline.errors import BadInput
from stages.read.tokenizer import open_tokenizer


class Panic(BaseException):
    """Stands for that of pyo3."""


@pytest.mark.parametrize("error", [NotImplementedError(), ValueError(""), KeyError("a key"), Panic("one line\nanother")])
def test_whatever_is_raised_is_one_problem(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    before = logging.get_verbosity(), os.environ.get("TQDM_DISABLE")
    with pytest.raises(BadInput) as caught:
        open_tokenizer(tmp_path)
    (problem,) = caught.value.problems
    said = (str(error).splitlines() or [type(error).__name__])[0]
    assert problem.found == f"no tokenizer that transformers can open ({said})"
    assert (logging.get_verbosity(), os.environ.get("TQDM_DISABLE")) == before


def test_an_interruption_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(KeyboardInterrupt):
        open_tokenizer(tmp_path)


def test_a_damaged_file_at_which_its_reader_panics(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 5}, "merges": ["a b"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(BadInput, match="no tokenizer that transformers can open"):
        open_tokenizer(tmp_path)


def test_a_directory_without_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tokenizer that transformers can open"):
        open_tokenizer(tmp_path)
