"""Scratch of a calibration that is kept: conversions that take it up for other ranges, and conversions that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import BadInput, convert
from pipeline.errors import Problem, SourceChanged
from pipeline.planning.plans import Plan
from stages.calibrate.layers import LayeredModel
from tests.pipeline.calibration.test_one_graph import CONFIG, words
from tests.pipeline.calibration.test_one_graph import made as made
from tests.support import checkpoints
from tests.support import quantized_checkpoints as source
from tests.support.commands import headrace, tree

CACHE: dict[str, Any] = {"int8_kv_cache": True, "smoothquant": None, "per_channel": False, "per_token": False}


def scratch(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob(".headrace-scratch/*-calibrate-*"))


@pytest.fixture
def options(made: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**made, "calibration_tokens": tmp_path / "tokens", "scheduler": "threads"}


@pytest.fixture
def zeros(options: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The options of SmoothQuant of a model whose second layer gives zeros, of which the ranges for a cache are kept."""
    tensors = source.values(CONFIG)
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 0
    checkpoints.save(tmp_path / "model", CONFIG, tensors)
    convert(**{**options, **CACHE}, output_dir=tmp_path / "one", keep_scratch=True)
    assert len(scratch(tmp_path)) == 1
    return {**options, "output_dir": tmp_path / "two"}


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_ranges_that_the_run_before_had_no_use_for_are_looked_at(command: str, zeros: dict[str, Any], tmp_path: Path) -> None:
    before = tree(tmp_path)
    ran = headrace(command, *[word for name, value in zeros.items() for word in words(name, value)])
    assert ran.code == 2, ran
    assert "model.layers.1.self_attn.o_proj|y: found nothing but zeros" in " ".join((ran.out + ran.err).split())
    assert tree(tmp_path) == before


def test_they_are_looked_at_once_more_when_nobody_else_is_at_work(
    zeros: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "obstacles", lambda _: [])  # as before another run had measured any
    (place,) = scratch(tmp_path)
    ranges = sorted(place.glob("ranges.*"))
    with pytest.raises(BadInput, match=r"model.layers.1.self_attn.o_proj\|y: found nothing but zeros"):
        convert(**zeros)
    assert not (tmp_path / "two").exists()
    assert sorted(place.glob("ranges.*")) == ranges


def test_a_target_that_has_no_use_for_them_either_is_made(zeros: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayeredModel, "run", None)  # which nothing calls
    convert(**{**zeros, **CACHE, "fp8_kv_cache": True, "int8_kv_cache": False})


ENDS: dict[str, tuple[bool, bool, BaseException, bool]] = {
    # whether an earlier run keeps it, whether this one does, how this one ends, and whether it is there then
    "refused": (False, True, BadInput([Problem("a", "b", "c")]), True),
    "refused, of an earlier run": (True, False, BadInput([Problem("a", "b", "c")]), True),
    "refused, and not kept": (False, False, BadInput([Problem("a", "b", "c")]), False),
    "changed": (True, True, SourceChanged(["model"]), False),
}


@pytest.mark.parametrize("how", ENDS)
def test_what_is_left_of_it_by_a_run_that_is_given_up(
    how: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, own, error, left = ENDS[how]
    if earlier:
        convert(**options, output_dir=tmp_path / "one", keep_scratch=True)

    def end(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.planning.dask_graph.finish_output", end)
        with pytest.raises(type(error)):
            convert(**options, output_dir=tmp_path / "two", keep_scratch=own)
    assert not (tmp_path / "two").exists()
    assert bool(scratch(tmp_path)) == left
    if left:
        monkeypatch.setattr(LayeredModel, "run", None)  # which nothing calls
        convert(**options, output_dir=tmp_path / "two")


def test_a_run_that_does_not_keep_it_leaves_it(options: dict[str, Any], tmp_path: Path) -> None:
    convert(**options, output_dir=tmp_path / "one", keep_scratch=True)
    convert(**options, output_dir=tmp_path / "two")
    assert len(scratch(tmp_path)) == 1


def test_what_is_kept_for_some_outputs_goes_with_the_last_of_them(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"keep_scratch": True, "scratch_outputs": [tmp_path / "one", tmp_path / "two"]}
    convert(**options, output_dir=tmp_path / "one")
    assert len(scratch(tmp_path)) == 1
    convert(**options, output_dir=tmp_path / "two")
    assert not (tmp_path / ".headrace-scratch").exists()
