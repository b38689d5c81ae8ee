"""`headrace verify` where there is no terminal: lines of progress, and the page of all that it found in the same run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.cli.verify import FEW_TOKENS, one_thread
from tests.support import checkpoints
from tests.support.commands import convert, headrace


@pytest.fixture
def output(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    assert convert(tmp_path / "model", tmp_path / "out", "--tp_size", 2, "--quiet").code == 0
    return tmp_path / "out"


def test_lines_and_the_page(output: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ran = headrace("verify", output, "--source", tmp_path / "model", "--logits", "--tokens", 3, "--report", page)
    assert ran.code == 0, ran
    assert {"integrity: 100 %", "round trip: 100 %", "logits: 100 %"} <= set(ran.err.splitlines())
    assert f"wrote {page}" in ran.out
    text = page.read_text()
    assert "3 tokens through the model" in text
    assert "Verified: nothing wrong was found" in text
    page.unlink()
    silent = headrace("verify", output, "--source", tmp_path / "model", "--report", page, "--quiet")
    assert (silent.code, silent.out, silent.err) == (0, "", "")
    assert page.exists()


def test_a_page_that_cannot_be_is_refused_before_anything_is_read(output: Path) -> None:
    for place, found in ((output / "page.html", "a file in"), (output.parent / "page.txt", "another kind of file")):
        ran = headrace("verify", output, "--report", place)
        assert ran.code == 2
        assert f"--report {place}: found {found}" in ran.err
        assert not place.exists()


def test_a_page_says_what_is_wrong(output: Path) -> None:
    rank = output / "rank1.safetensors"
    rank.write_bytes(rank.read_bytes()[:-1])
    page = output.parent / "page.html"
    assert headrace("verify", output, "--report", page, "--quiet").code == 5
    assert "Something is wrong" in page.read_text()


def test_few_tokens_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one_thread(FEW_TOKENS + 1)
    assert "OMP_NUM_THREADS" not in os.environ
    one_thread(FEW_TOKENS)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    one_thread(1)
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--quant_ckpt_path", "packed"), "--quant_ckpt_path packed: found no source to compare with"),
        (("--tokens", 5), "--tokens 5: found no --logits beside it"),
        (("--source", "model", "--prompt", "a", "--tokens", 5), "--tokens 5: found --prompt beside it"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(output: Path, words: tuple[object, ...], found: str) -> None:
    ran = headrace("verify", output, *words)
    assert (ran.code, ran.out) == (2, "")
    assert found in ran.err
