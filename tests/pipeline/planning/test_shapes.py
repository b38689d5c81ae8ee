"""Shapes of published models (tests/data/shapes): every plan works, or ends with one short report of one reason, and `inspect` says
which, what a model becomes by which options and at which tp_sizes.

By day a few shapes, by night all, each in a process with a limit of processor time and of memory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Ran, headrace, limited
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
WORKS = ("converts at every --tp_size that divides: ", "converts at --tp_size ")
LONGEST = 420  # characters of a reason
BY_DAY = [
    "meta-llama/Llama-3.2-1B-Instruct",
    "microsoft/Phi-3.5-mini-instruct",
    "google/gemma-2b-it",
    "Qwen/Qwen3-0.6B",
    "internlm/internlm2-chat-7b",
    "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct (tied)",
    "ibm-granite/granite-3.3-2b-instruct",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503 (Mistral3)",
    "Qwen/Qwen2-VL-7B-Instruct (olmOCR, real config and index)",
    "baichuan-inc/Baichuan2-7B-Chat",
    "bigcode/starcoder2-15b",
    "mlx-community/Llama-3.2-1B-Instruct-8bit (MLX, quantization_config too)",
]
# A model that is planned, on a machine whose disk is too small for it.
NO_ROOM = re.compile("would not convert: 1 problem - --output_dir [^:]+: found [0-9.]+ [A-Za-z]+ free; expected room for ")


def forms(name: str) -> list[str]:
    shape = shapes()[name]
    said = {*shape.config, *(key for file in shape.extra for key in [file.partition(".")[0]])}
    return list(FORMS) if any("quant" in key or "compression" in key for key in said) else ["as it is"]


def reasons(ran: Ran) -> list[str]:
    """The problems of a plan, whose report is short; none of a plan that works."""
    assert ran.code in (0, 2), ran
    assert "Traceback" not in ran.err, ran.err
    if ran.code == 0 or NO_ROOM.match(" ".join(ran.out.split())):
        assert not ran.err, ran.err
        return []
    head, *problems = ran.err.splitlines()
    assert head.startswith("headrace: "), ran.err
    assert 1 <= len(problems) <= PROBLEMS, ran.err
    assert len(ran.err) <= CHARACTERS, ran.err
    return problems


def said_of(ran: Ran, refused: bool) -> dict[str, Any]:
    """The facts of an inspection, which say of each way what it comes to, in one line; by `refused`, whether a plan was."""
    assert ran.code == 0, ran
    said: dict[str, Any] = json.loads(ran.out)
    ways = said["conversions"]
    assert bool(said["problems"]) is refused
    for way in ways:
        assert len(way["says"]) <= LONGEST
        if way["becomes"] is None:
            assert way["says"].startswith("no: ")
            assert not way["tp_sizes"]
        else:
            assert way["says"].startswith(WORKS)
            assert all(str(size) in way["says"] for size in way["tp_sizes"])
    if not refused:
        assert said["family"]
        assert ways[0]["options"] == ""
        assert ways[0]["becomes"]
        assert ways[0]["tp_sizes"] == said["tp_sizes"]
    elif ways:
        assert ways[0]["becomes"] is None
    return said


@pytest.mark.parametrize("name", BY_DAY)
def test_a_shape_is_planned_or_refused_in_a_few_words(name: str, tmp_path: Path) -> None:
    model = shapes()[name].build(tmp_path / "model")
    refused = reasons(headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out"))
    assert not refused or name not in PLANNED["as it is"], refused
    said_of(headrace("inspect", model, "--json"), bool(refused))


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
    said = said_of(limited(LIMITS, "inspect", model, "--json"), bool(first))
    assert len(said["problems"]) == len(first)
    if first:
        return
    size = said["tp_sizes"][-1]
    assert not reasons(limited(LIMITS, "plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--tp_size", size))
    asked = ("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--tp_size", 2 * size + 1)
    assert len(reasons(limited(LIMITS, *asked))) >= 1


def test_what_must_be_planned_is_of_shapes() -> None:
    assert PLANNED.keys() == FORMS.keys()
    assert set.union(*PLANNED.values()) <= shapes().keys()
    assert len(PLANNED["as it is"]) > 95
    assert len(shapes()) > 180
