"""Classifiers: the rows of labels that a rank computes are those of transformers' own model, of its last token too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from pipeline import BadInput, convert, plan
from pipeline.reporting.verification import verify
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from tests.end_to_end.test_family_forward import SIZES, Case, build, difference

TOLERANCE = 1e-5
LABELS: dict[str, Any] = {"num_labels": 6, "num_hidden_layers": 3, "pad_token_id": 0}
CASES = {
    "qwen2": Case(Qwen2Config, Qwen2ForSequenceClassification, LABELS),
    "llama": Case(LlamaConfig, LlamaForSequenceClassification, LABELS),
}
TARGETS: dict[str, dict[str, Any]] = {"tp1": {}, "tp2pp2": {"tp_size": 2, "pp_size": 2}}


def expected(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The labels' logits at every token."""
    with torch.no_grad():
        hidden = model.model(tokens[None]).last_hidden_state[0]
        every: torch.Tensor = model.score(hidden)
        assert torch.equal(every[-1], model(tokens[None]).logits[0])
    return every


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_a_classifier(name: str, target: str, tmp_path: Path) -> None:
    model = build(CASES[name])
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "ranks"
    convert(model_dir=tmp_path / "model", output_dir=output, dtype="float32", scheduler="synchronous", **TARGETS[target])
    tokens = torch.randint(1, SIZES["vocab_size"], (20,), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(open_checkpoint(output))
    assert difference(decoder.logits(tokens), expected(model, tokens)) < TOLERANCE
    assert decoder.unused() == []
    written = json.loads((output / "config.json").read_text())
    assert (written["architecture"], written["num_labels"]) == ("Qwen2ForSequenceClassification", 6)
    verify(output, tmp_path / "model", logits=True, tokens=11).check()


@pytest.mark.parametrize("labels", [1, 6])
def test_the_head_is_not_padded(labels: int, tmp_path: Path) -> None:
    """NVIDIA's class cuts it as it is, so that tp_size must divide the labels."""
    build(Case(Qwen2Config, Qwen2ForSequenceClassification, {**LABELS, "num_labels": labels})).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match=f"num_labels {labels}"):
        plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=4)


def test_labels_that_the_configuration_does_not_count_are_those_of_the_head(tmp_path: Path) -> None:
    build(CASES["qwen2"]).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("id2label", "label2id")}
    path.write_text(json.dumps(config))
    made = plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    assert "num_labels 6: config.json does not say it, its tensors do" in made.notes
