"""A trained model on three ranks: its values are the source's, its logits transformers', and it goes on with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import convert
from pipeline.reporting.generation import generate_text
from pipeline.reporting.verification import verify
from tests.support.places import SMOLLM2 as MODEL

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert MODEL.exists(), "run the tests with `make test`, which fetches the model"
    output = tmp_path_factory.mktemp("smollm2") / "ranks"
    convert(model_dir=MODEL, output_dir=output, tp_size=3, scheduler="threads")
    return output


@pytest.mark.nightly  # `make demo` does the same
def test_logits_are_those_of_transformers(ranks: Path) -> None:
    result = verify(ranks, MODEL, prompt=PROMPT, logits=True)
    result.check()
    assert result.logits is not None
    source, joined = result.logits["comparisons"]
    assert source["top1_agreement"] == joined["top1_agreement"] == 1
    assert joined["max_relative"] < 1e-5  # float32 sums in another order
    assert source["max_relative"] < 1e-2  # GGUF's blocks as float16
    assert result.round_trip is not None
    assert all(row["exact"] for row in result.round_trip["tensors"])


def test_the_ranks_know_the_capital_of_france(ranks: Path) -> None:
    text = "".join(generate_text(ranks, PROMPT, count=4))
    assert text.startswith(f"{PROMPT} Paris.")
