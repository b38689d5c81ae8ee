"""Shapes of published models (tests/data/shapes): every plan works, or ends with one short report of one reason.

By day a few shapes, by night all, each in a process with a limit of processor time and of memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import REFUSED, Ran, headrace, limited
from tests.support.places import DATA
from tests.support.shapes import shapes

PROBLEMS, CHARACTERS = 3, 2000  # the most that a report may have
# Seconds of one process: the largest shape, 30,000 tensors or 75,000 of GPTQ, takes a fifth of it.
LIMITS = {"RLIMIT_CPU": 240, "RLIMIT_DATA": 3 << 30}
FORMS = {
    "as it is": [],
    "numbers": ["--dequantize"],
    "again": ["--requantize", "--use_weight_only", "--weight_only_precision", "int4_gptq", "--group_size", "128"],
}
# The shapes that must be planned, by form; the others may be, or are refused in a few words.
PLANNED = {form: set(names) for form, names in json.loads((DATA / "shapes" / "planned.json").read_text()).items()}
BY_DAY = [
    "meta-llama/Llama-3.2-1B-Instruct",
    "microsoft/Phi-3.5-mini-instruct",
    "google/gemma-2b-it",
    "Qwen/Qwen3-0.6B",
    "internlm/internlm2-chat-7b",
    "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct (tied)",
    "ibm-granite/granite-3.3-2b-instruct",
    "bigcode/starcoder2-15b",
    "mlx-community/Llama-3.2-1B-Instruct-8bit (MLX, quantization_config too)",
]


def forms(name: str) -> list[str]:
    shape = shapes()[name]
    said = {*shape.config, *(key for file in shape.extra for key in [file.partition(".")[0]])}
    return list(FORMS) if any("quant" in key or "compression" in key for key in said) else ["as it is"]


def reasons(ran: Ran) -> list[str]:
    """The problems of a plan, whose report is short; none of a plan that works."""
    assert ran.code in (0, 2), ran
    assert "Traceback" not in ran.err, ran.err
    if ran.code == 0:
        assert not ran.err, ran.err
        return []
    head, *problems = ran.err.splitlines()
    assert head.endswith(REFUSED), ran.err
    assert 1 <= len(problems) <= PROBLEMS, ran.err
    assert len(ran.err) <= CHARACTERS, ran.err
    return problems


@pytest.mark.parametrize("name", BY_DAY)
def test_a_shape_is_planned_or_refused_in_a_few_words(name: str, tmp_path: Path) -> None:
    model = shapes()[name].build(tmp_path / "model")
    refused = reasons(headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out"))
    assert not refused or name not in PLANNED["as it is"], refused


@pytest.mark.nightly
@pytest.mark.parametrize("name", shapes())
def test_every_shape_is_planned_or_refused_in_a_few_words(name: str, tmp_path: Path) -> None:
    model = shapes()[name].build(tmp_path / "model")
    first: list[str] = []
    for form in forms(name):
        ran = limited(LIMITS, "plan", "--model_dir", model, "--output_dir", tmp_path / "out", *FORMS[form])
        problems = reasons(ran)
        assert not problems or name not in PLANNED[form], problems
        first = first or problems if form == "as it is" else first
    ran = limited(LIMITS, "inspect", model, "--json")
    assert ran.code == 0, ran
    said = json.loads(ran.out)
    assert len(said["problems"]) == len(first)
    if first:
        return
    assert said["family"]
    size = said["tp_sizes"][-1]
    assert not reasons(limited(LIMITS, "plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--tp_size", size))
    asked = ("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--tp_size", 2 * size + 1)
    assert len(reasons(limited(LIMITS, *asked))) >= 1


def test_what_must_be_planned_is_of_shapes() -> None:
    assert PLANNED.keys() == FORMS.keys()
    assert set.union(*PLANNED.values()) <= shapes().keys()
    assert len(PLANNED["as it is"]) > 80
    assert len(shapes()) > 180
