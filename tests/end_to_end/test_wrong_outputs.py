"""Outputs of 0.1.0 that engines of TensorRT-LLM 1.2 would compute as other models, or that no engine could be built of.

tests/data/wrong holds a model and that version's rank files of each. They fail verification for the reason; converted anew, the
model is right, or it is refused with a remedy that works.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import convert, plan
from pipeline.errors import BadInput, VerificationFailed
from pipeline.reporting.verification import verify
from tests.support.commands import headrace
from tests.support.places import DATA

WRONG = DATA / "wrong"


@dataclass(frozen=True)
class Case:
    """What is said of an output, and of its model when it is converted anew.

    `found`: what verification says. `options`: those of the conversion. `refused`: what a plan says, "" where it converts now.
    `remedy`: the options that the plan advises. `note`: a part of what the plan notes.
    """

    found: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    remedy: dict[str, Any] = field(default_factory=dict)
    note: str = ""


ROWWISE = {"use_fp8_rowwise": True}
WITHOUT = {"rope_scaling": "none"}
NO_WINDOW = "runtime_defaults.max_attention_window: found none"
CASES = {
    "phi3_stages": Case(
        "mapping.pp_size: found 2 pipeline stages", {"pp_size": 2}, "--pp_size 2: found 2 pipeline stages", {"tp_size": 2}
    ),
    "llama_dynamic": Case(
        "rotary_scaling.alpha: found dynamic without it",
        {},
        "rope_scaling.alpha: found dynamic without it; expected a value: TensorRT-LLM 1.2 asserts alpha. Give --rope_scaling none",
        WITHOUT,
        "exact up to 64 tokens",
    ),
    "llama_yarn_length": Case("rotary_scaling.original_max_position_embeddings: found yarn without", note="is written as 64"),
    "llama_yarn_factor": Case(
        "rotary_scaling.attention_factor: found 1.5", {}, "rope_scaling.attention_factor: found 1.5", WITHOUT, "exact at no length"
    ),
    "llama_longrope": Case(
        "rotary_scaling: found 'longrope'", {}, "rope_scaling: found 'longrope'; expected one of", WITHOUT, "exact at no length"
    ),
    "llama_default": Case("rotary_scaling: found 'default'; expected null"),
    "llama_unknown": Case(
        "rotary_scaling: found 'cosine'", {}, "rope_scaling: found 'cosine'; expected one of", WITHOUT, "exact at no length"
    ),
    "qwen3_fp8_rowwise": Case("has q and k norms, without", ROWWISE, note="*q_layernorm"),
    "granite_fp8_rowwise": Case("has scaled scores, without", ROWWISE, note="*attention"),
    "gemma2_fp8_rowwise": Case("capped scores and norms around the MLP", ROWWISE, "Fp8RowwiseAttention computes none of these"),
    "gemma3_fp8_rowwise": Case("local rope and norms around the MLP", ROWWISE, "Fp8RowwiseAttention computes none of these"),
    "phi3_long_fp8_rowwise": Case("has long rope", ROWWISE, "Fp8RowwiseAttention computes none of these"),
    "mistral_window": Case(NO_WINDOW, note="every layer sees 7 tokens"),
    "qwen2_window": Case(NO_WINDOW, note="1 of each 2 layers sees 7 tokens"),
    "gemma2_window": Case(NO_WINDOW, note="1 of each 2 layers sees 7 tokens"),
    "gemma3_window": Case(NO_WINDOW, note="sees 7 tokens"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_fails_with_the_reason(name: str) -> None:
    result = verify(WRONG / name / "ranks", WRONG / name / "model")
    assert not result.ok
    with pytest.raises(VerificationFailed) as error:
        result.check()
    assert CASES[name].found in str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_converted_right_or_refused_with_a_remedy_that_works(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], WRONG / name / "model"
    options = dict(case.options)
    if case.refused:
        with pytest.raises(BadInput) as error:
            plan(model_dir=model, output_dir=tmp_path / "ranks", **options)
        (problem,) = error.value.problems
        assert case.refused in str(problem)
        assert problem.remedy
        options = case.remedy
    planned = plan(model_dir=model, output_dir=tmp_path / "ranks", **options)
    assert case.note in "\n".join(planned.notes)
    convert(model_dir=model, output_dir=tmp_path / "ranks", scheduler="synchronous", **options)
    # What is left out on request, transformers still computes.
    result = verify(tmp_path / "ranks", model, logits=options != WITHOUT or "exact up to" in case.note, tokens=20)
    result.check()


def test_the_command_ends_with_the_exit_code_of_a_failed_verification() -> None:
    result = headrace("verify", WRONG / "mistral_window" / "ranks", "--source", WRONG / "mistral_window" / "model")
    assert result.code == 5
    assert "max_attention_window" in result.err


def test_every_output_has_its_case() -> None:
    assert {path.name for path in WRONG.iterdir()} == CASES.keys()
    for path in WRONG.iterdir():
        assert json.loads((path / "ranks/headrace.json").read_text())["headrace"] == "0.1.0"
