"""Parallel sizes that the model does not divide: refused, and what the report says would work does work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import checkpoints
from tests.support.commands import headrace, refused

LLAMA, MIXTRAL = checkpoints.LLAMA, checkpoints.MIXTRAL
PARALLEL_0 = ("--use_parallel_embedding", "--embedding_sharding_dim", 0)
PARALLEL_1 = ("--use_parallel_embedding", "--embedding_sharding_dim", 1)

# name -> (what config.json has besides, the flags, the flag that does not fit, what the report must say)
REFUSED: dict[str, tuple[dict[str, Any], tuple[object, ...], str, str]] = {
    "heads": (LLAMA, ("--tp_size", 3), "tp_size", "num_attention_heads 8"),
    "more ranks than heads": (LLAMA, ("--tp_size", 16), "tp_size", "num_attention_heads 8"),
    "heads, many stages": (LLAMA, ("--tp_size", 5, "--pp_size", 3), "tp_size", "num_attention_heads 8"),
    "kv heads": (
        {**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 96},
        ("--tp_size", 3),
        "tp_size",
        "num_key_value_heads 4",
    ),
    "kv heads fewer than ranks": (
        {**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 96},
        ("--tp_size", 4),
        "tp_size",
        "num_key_value_heads 3",
    ),
    "MLP": ({**LLAMA, "intermediate_size": 36}, ("--tp_size", 8), "tp_size", "intermediate_size 36"),
    "hidden size of the embedding": (
        {**LLAMA, "hidden_size": 36, "head_dim": 8},
        ("--tp_size", 8, *PARALLEL_1),
        "tp_size",
        "hidden_size 36",
    ),
    "layers": (LLAMA, ("--pp_size", 4), "pp_size", "3 layers"),
    "experts": (MIXTRAL, ("--tp_size", 8, "--moe_ep_size", 8), "moe_ep_size", "4 experts"),
    "experts over three": (
        {**MIXTRAL, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8},
        ("--tp_size", 6, "--moe_ep_size", 3),
        "moe_ep_size",
        "4 experts",
    ),
    "inside the experts": ({**MIXTRAL, "intermediate_size": 36}, ("--tp_size", 8), "moe_tp_size", "intermediate_size 36"),
    "heads of a model with experts": ({**MIXTRAL, "intermediate_size": 36}, ("--tp_size", 3), "tp_size", "num_attention_heads 8"),
    "experts of a dense model": (LLAMA, ("--tp_size", 2, "--moe_ep_size", 2), "moe_ep_size", "without experts"),
}


def plan(model: Path, *flags: object) -> int:
    return headrace("plan", "--json", "--model_dir", model, "--output_dir", model.parent / "out", *flags).code


def works(problem: str) -> list[int]:
    """The sizes that a report says would work."""
    expected = problem.partition("; expected ")[2]
    if expected == "one of: none":
        return []
    found = re.match(r"(one of: |at most )?(\d+(?:, \d+)*)", expected)
    assert found, problem
    numbers = [int(n) for n in found[2].split(", ")]
    return list(range(1, numbers[0] + 1)) if found[1] == "at most " else numbers


def with_size(flags: tuple[object, ...], option: str, size: int) -> tuple[object, ...]:
    """The flags with another value of one."""
    given = {flags[i]: flags[i + 1] for i in range(len(flags) - 1) if str(flags[i]).startswith("--")}
    parallel = [flag for flag in flags if flag == "--use_parallel_embedding"]
    pairs = {key: value for key, value in given.items() if key != "--use_parallel_embedding"} | {f"--{option}": size}
    return (*parallel, *(item for pair in pairs.items() for item in pair))


@pytest.mark.parametrize("case", REFUSED)
def test_a_size_that_does_not_divide_and_those_that_would(tmp_path: Path, case: str) -> None:
    config, flags, option, why = REFUSED[case]
    checkpoints.write(tmp_path / "model", config)
    problems = [problem for problem in refused(tmp_path / "model", *flags) if problem.startswith(f"--{option} ")]
    assert len(problems) == 1
    assert why in problems[0]
    for size in works(problems[0]):
        assert plan(tmp_path / "model", *with_size(flags, option, size)) == 0, f"{problems[0]}, but {size} does not work"


@pytest.mark.parametrize(
    "flags",
    [
        ("--tp_size", 4, "--moe_tp_size", 4, "--moe_ep_size", 2),
        ("--tp_size", 2, "--moe_ep_size", 4),
        ("--tp_size", 2, "--moe_tp_size", 4),
        ("--tp_size", 4, "--moe_tp_size", 3),
        ("--moe_tp_size", 2),
    ],
    ids=str,
)
def test_expert_sizes_that_do_not_make_up_tp_size(tmp_path: Path, flags: tuple[object, ...]) -> None:
    checkpoints.write(tmp_path / "model", MIXTRAL)
    report = "\n".join(refused(tmp_path / "model", *flags))
    assert "--moe_tp_size" in report
    assert "--moe_ep_size" in report
    assert "--tp_size" in report


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (LLAMA, ("--tp_size", 8)),
        (LLAMA, ("--tp_size", 4, "--pp_size", 3)),
        (LLAMA, ("--tp_size", 8, *PARALLEL_0)),
        (LLAMA, ("--tp_size", 8, *PARALLEL_1)),
        ({**LLAMA, "vocab_size": 97}, ("--tp_size", 8, *PARALLEL_0)),
        (MIXTRAL, ("--tp_size", 4, "--moe_ep_size", 4)),
        (MIXTRAL, ("--tp_size", 4, "--moe_tp_size", 2)),
        (LLAMA, ("--cp_size", 2)),
    ],
    ids=str,
)
def test_sizes_that_fit_are_planned(tmp_path: Path, config: dict[str, Any], flags: tuple[object, ...]) -> None:
    checkpoints.write(tmp_path / "model", config)
    assert plan(tmp_path / "model", *flags) == 0


def test_every_size_that_does_not_fit_is_in_one_report(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", MIXTRAL)
    report = "\n".join(refused(tmp_path / "model", "--tp_size", 5, "--pp_size", 9, "--moe_ep_size", 5))
    for subject in ("--tp_size 5: ", "--pp_size 9: ", "--moe_ep_size 5: "):
        assert subject in report


def test_sizes_of_the_model_and_of_the_request_come_in_one_report(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", LLAMA)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitnet"}}))
    report = "\n".join(refused(tmp_path / "model", "--tp_size", 3))
    assert "--tp_size 3: " in report
    assert "bitnet" in report
