"""Whatever kind of value config.json has for a key, each level of a verification finds it wrong, refuses it, or is right."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from pipeline.errors import BadInput, VerificationFailed
from pipeline.reporting.html import describe_directory, render_report
from pipeline.reporting.verification import verify
from stages.read.ranks import open_checkpoint
from stages.verify.contract.settings import read_settings
from stages.verify.forward.decoder import Decoder
from tests.goldens.differences import as_1_2_reads
from tests.support.examples import examples
from tests.support.places import DATA

# An output of each class, and its source.
CASES = {
    "dense/gqa_tp2": "dense/models/gqa_fp16",
    "dense/mixtral_tp2ep2": "dense/models/mixtral_bf16",
    "families/gemma3_tp2": "families/models/gemma3",
    "families/phi3_longrope_tp1": "families/models/phi3_longrope",
    "families/phimoe_ep2": "families/models/phimoe",
    "families/qwen2_moe_tp4ep2_f16": "families/models/qwen2_moe",
    "quantized/q_bf16-int8-tp2pp1-auto-sm80": "quantized/models/q_bf16",
}
# A value of each kind: another type, nothing, of a sign or size that none has.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 10**30, 10**400),
    *(0.0, -1.5, 0.5, 1e39, float("inf"), float("nan"), "", "x", "16", "float16"),
    *([], [1], [1, 1], ["a", "b", "c"], [None], {}, {"a": 1}, {"type": "linear"}, {"type": ["x"]}, [[1.5]]),
)


def keys(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The keys of config.json and of its tables, and some that a class may read though this file has none of them."""
    more = ("moe", "quantization", "rotary_scaling", "head_size", "rotary_embedding_dim", "residual_multiplier", "pp_partition")
    tables = [(key, inner) for key, table in config.items() if isinstance(table, dict) for inner in table]
    return [*((key,) for key in (*config, *more)), *tables, ("mapping", "pp_partition"), ("mapping", "cp_config")]


def changed(config: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(config)
    table = result
    for name in key[:-1]:
        table = table[name]
    table[key[-1]] = value
    return result


def look(output: Path, source: Path) -> None:
    """Everything that reads an output and writes nothing. Raises what is neither a finding nor a refusal."""
    try:
        findings = verify(output, source, workers=1).findings
        str([finding.problem for finding in findings])
    except BadInput:
        findings = ()
    try:
        checkpoint = open_checkpoint(output)
        if not read_settings(checkpoint.config)[1]:
            Decoder(checkpoint).logits(torch.tensor([1, 2, 3]))
    except (BadInput, VerificationFailed):
        pass
    render_report(describe_directory(output))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, dict[str, Any]]]]:
    """A copy of each case, and its config.json as 1.2 takes it."""
    made = {}
    for case in CASES:
        kind, _, name = case.partition("/")
        output = Path(shutil.copytree(DATA / kind / "expected" / name, tmp_path_factory.mktemp("outputs") / "out"))
        made[case] = output, as_1_2_reads(json.loads((output / "config.json").read_text()), case)
    yield made
    for output, _ in made.values():
        shutil.rmtree(output)


@pytest.mark.parametrize("case", CASES)
def test_unchanged_they_are_read(case: str, outputs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    output, config = outputs[case]
    (output / "config.json").write_text(json.dumps(config))
    assert [str(finding.problem) for finding in verify(output, DATA / CASES[case]).findings if finding.level == "integrity"] == []
    Decoder(open_checkpoint(output)).logits(torch.tensor([1, 2, 3]))


@examples(150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(CASES)), st.sampled_from(range(200)), st.sampled_from(VALUES))
def test_no_kind_of_value_is_a_traceback(
    outputs: dict[str, tuple[Path, dict[str, Any]]], case: str, place: int, value: Any
) -> None:
    output, config = outputs[case]
    places = keys(config)
    (output / "config.json").write_text(json.dumps(changed(config, places[place % len(places)], value)))
    look(output, DATA / CASES[case])
