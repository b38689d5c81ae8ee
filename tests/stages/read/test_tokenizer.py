"""A checkpoint's tokenizer: what transformers cannot open is a problem, whatever it raises, and its settings stay as they were."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.utils import logging

from pipeline.errors import BadInput
from stages.read.tokenizer import open_tokenizer


@pytest.mark.parametrize("error", [NotImplementedError(), ValueError(""), KeyError("a key"), RuntimeError("one line\nanother")])
def test_whatever_is_raised_is_one_problem(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_directory_without_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tokenizer that transformers can open"):
        open_tokenizer(tmp_path)
