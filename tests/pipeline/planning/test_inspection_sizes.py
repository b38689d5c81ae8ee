"""`headrace inspect`: the types and sizes that a checkpoint converts to are those that can be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import BadInput, plan
from tests.support import checkpoints, quantized_checkpoints
from tests.support.checkpoints import LLAMA, MIXTRAL
from tests.support.inspections import inspected, table
from tests.support.places import DATA


def test_what_it_becomes_and_at_which_sizes(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 256}
    checkpoints.write(tmp_path / "model", config)
    ways = {way["options"]: way for way in inspected(tmp_path / "model")["conversions"]}
    assert list(ways) == ["", "--quantization int8", "--quantization int4", "--quantization fp8_rowwise"]
    assert [way["becomes"] for way in ways.values()] == ["float16", "W8A16", "W4A16", "FP8_PER_CHANNEL_PER_TOKEN"]
    assert ways[""]["says"] == "converts at every --tp_size that divides: 1, 2, 4, 8"
    eighth = ways["--quantization int8"]["says"]
    assert eighth.startswith("converts at --tp_size 1, 2, 4, not at 8: at 8 ")
    assert eighth.endswith(" a rank, where the kernels need a multiple of 64")
    for options, way in ways.items():
        for size in (1, 2, 4, 8):
            given = {"quantization": options.split()[1]} if options else {}
            fits = size in way["tp_sizes"]
            try:
                plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", tp_size=size, **given)
            except BadInput:
                assert not fits, (options, size)
            else:
                assert fits, (options, size)
    shown = table(tmp_path / "model")["converts"]
    assert shown[0] == "as it is, to float16: converts at every --tp_size that divides: 1, 2, 4, 8"
    assert shown[1] == f"--quantization int8, to W8A16: {eighth}"


def test_what_is_refused_as_it_is_may_become_something_else(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 256}
    given = quantized_checkpoints.gptq(index="order")
    quantized_checkpoints.write(tmp_path / "model", config, given)
    ways = {way["options"]: way for way in inspected(tmp_path / "model")["conversions"]}
    assert ways[""]["becomes"] is None
    assert ways[""]["says"].startswith("no: model.layers.0.mlp.down_proj.g_idx: found groups in the order of the activations")
    assert ways["--dequantize"]["becomes"] == "float16"
    assert ways["--requantize --quantization int4_gptq --group_size 128"]["becomes"] == "W4A16_GPTQ"


def test_a_reason_that_all_options_have_is_said_once(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    said = inspected(tmp_path / "model")
    assert [way["becomes"] for way in said["conversions"]] == [None] * 4
    (row,) = table(tmp_path / "model")["converts"]
    assert row.startswith("as it is: no: ")
    assert "rope_scaling.alpha" in row


SHAPES: dict[str, dict[str, Any]] = {
    "plain": LLAMA,
    "one kv head": {**LLAMA, "num_key_value_heads": 1},
    "heads of three": {**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 8},
    "odd rows": {**LLAMA, "intermediate_size": 158},
    "nine heads": {**LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 162},
    "experts": MIXTRAL,
    "experts of odd rows": {**MIXTRAL, "intermediate_size": 42},
    "three experts": {**MIXTRAL, "num_local_experts": 3},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_sizes_said_are_those_that_can_be_planned(name: str, tmp_path: Path) -> None:
    config = SHAPES[name]
    checkpoints.write(tmp_path / "model", config)
    said = inspected(tmp_path / "model")

    def fits(**options: int) -> bool:
        try:
            plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out", **options)
        except BadInput:
            return False
        return True

    heads = config["num_attention_heads"]
    assert said["tp_sizes"] == [size for size in range(1, heads + 3) if fits(tp_size=size)]
    low, high = said["pp_sizes"]
    assert [size for size in range(1, high + 2) if fits(pp_size=size)] == list(range(low, high + 1))
    for size, pairs in said.get("moe_sizes", {}).items():
        tried = [(tp, ep) for tp in range(1, heads + 1) for ep in range(1, heads + 1) if tp * ep == int(size)]
        assert sorted(map(tuple, pairs)) == [
            (tp, ep) for tp, ep in tried if fits(tp_size=int(size), moe_tp_size=tp, moe_ep_size=ep)
        ]


def test_sizes_of_families_are_those_that_can_be_planned(tmp_path: Path) -> None:
    for name in ("gemma", "phi3", "internlm2", "qwen2_moe"):
        path = DATA / "families" / "models" / name
        said = inspected(path)
        found = []
        for size in range(1, said["model"]["num_attention_heads"] + 2):
            try:
                plan(model_dir=path, output_dir=tmp_path / "out", tp_size=size, dtype="bfloat16", rope_scaling="none")
            except BadInput:
                continue
            found.append(size)
        assert said["tp_sizes"] == found, name
