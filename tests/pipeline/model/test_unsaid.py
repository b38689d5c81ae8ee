"""What the size of a published model tells of a key that its file has no place for: Gemma's query_pre_attn_scalar in GGUF."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.model.published import PublishedSize
from pipeline.model.tables import Family, families, find_family
from pipeline.model.unsaid import FilledIn, fill_in

ROWS = [pytest.param(family, row, id=row.name) for family in families() for row in family.published]


def filled(architecture: str, config: dict[str, Any], **options: Any) -> FilledIn:
    family = find_family("gguf", architecture)
    assert family is not None
    return fill_in(config, family, "models/model.gguf", options)


@pytest.mark.parametrize(("family", "row"), ROWS)
def test_scores_of_a_published_size_are_divided_as_llama_cpp_does(family: Family, row: PublishedSize) -> None:
    """By the root of a head's size, but for the largest, where it is the share of the width that a head has."""
    width = row.when["embedding_length"] // row.when["attention.head_count"]
    expected = width if row.name.endswith("27B") else row.when["attention.key_length"]
    result = fill_in(row.when, family, "models/model.gguf", {})
    assert result.config == {**row.when, "query_pre_attn_scalar": expected}
    assert not result.problems
    (note,) = result.notes
    assert note.startswith(f"query_pre_attn_scalar {expected}: {row.name}'s, by block_count {row.when['block_count']}, ")
    assert note.endswith("in model.gguf; --query_pre_attn_scalar says another")


@pytest.mark.parametrize(("family", "row"), ROWS)
def test_the_option_goes_before_the_size(family: Family, row: PublishedSize) -> None:
    result = fill_in(row.when, family, "model.gguf", {"query_pre_attn_scalar": 7})
    assert result.config["query_pre_attn_scalar"] == 7
    assert (result.notes, result.problems) == ((), ())


@pytest.mark.parametrize("layers", [26, 27])
def test_another_size_needs_the_option(layers: int) -> None:
    config = {"block_count": layers, "embedding_length": 64}
    (problem,) = filled("gemma2", config).problems
    assert problem.subject == "models/model.gguf: query_pre_attn_scalar"
    assert problem.found.startswith(f"none, and block_count {layers}, embedding_length 64")
    assert "Gemma 2 2B, Gemma 2 9B, Gemma 2 27B" in problem.expected
    assert problem.remedy.startswith("Give --query_pre_attn_scalar")
    assert not filled("gemma2", config, query_pre_attn_scalar=7).problems


def test_what_a_file_says_itself_counts() -> None:
    result = filled("gemma3", {"query_pre_attn_scalar": 5})
    assert (result.config["query_pre_attn_scalar"], result.notes, result.problems) == (5, (), ())


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen3"])
def test_a_model_without_the_number_takes_no_option_for_it(architecture: str) -> None:
    (problem,) = filled(architecture, {}, query_pre_attn_scalar=7).problems
    assert problem.subject == "--query_pre_attn_scalar 7"
    assert problem.remedy.startswith("Leave it out")
    assert not filled(architecture, {}).problems


def test_options_of_other_containers_are_refused_beside_it() -> None:
    result = filled("gemma2", {}, query_pre_attn_scalar=7, rope_scaling_factor=8.0, max_position_embeddings=None)
    assert [problem.subject for problem in result.problems] == ["--rope_scaling_factor 8.0"]
