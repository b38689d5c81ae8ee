"""Attention that no class computes beyond a length: a plan says up to where the model is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.model.long_attention import long_attention_notes
from pipeline.planning.job import make_job
from pipeline.planning.make_plan import make_plan
from tests.support import checkpoints

KEY = "dual_chunk_attention_config"
SAID = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize(
    ("said", "note"),
    [
        (SAID, "exact up to 262144 tokens (original_max_position_embeddings), and not the model's beyond, up to its 1010000"),
        ({**SAID, "original_max_position_embeddings": 1010000}, "the model's 1010000 tokens need none of it"),
        ({"chunk_size": 8}, "where it begins is not known"),
        ({**SAID, "original_max_position_embeddings": True}, "where it begins is not known"),
    ],
)
def test_up_to_where_it_is_exact(said: dict[str, Any], note: str) -> None:
    (found,) = long_attention_notes({KEY: said}, 1010000)
    assert found.startswith("dual chunk attention: no class of TensorRT-LLM 1.2 computes it")
    assert note in found


@pytest.mark.parametrize("said", [None, {}, False, "x"])
def test_nothing_is_said_of_a_model_without(said: Any) -> None:
    assert long_attention_notes({KEY: said}, 1000) == ()
    assert long_attention_notes({}, 1000) == ()


def test_a_plan_says_it(tmp_path: Path) -> None:
    config = {**checkpoints.LLAMA, "max_position_embeddings": 64, KEY: {**SAID, "original_max_position_embeddings": 32}}
    checkpoints.save(tmp_path / "model", config, checkpoints.values(config))
    plan = make_plan(make_job({"model_dir": tmp_path / "model", "output_dir": tmp_path / "out"}))
    assert any("exact up to 32 tokens" in note for note in plan.notes)
