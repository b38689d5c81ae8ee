"""`headrace plan --graph`: files of three kinds, with and without Graphviz, and what is refused."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline import plan
from pipeline.planning.graph import PlanGraph
from pipeline.reporting import graph_drawing
from pipeline.reporting.graph_drawing import page, picture
from tests.pipeline.planning.test_graph import hostile
from tests.support import checkpoints
from tests.support.commands import headrace, tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    return tmp_path / "model"


@pytest.fixture
def graph(model: Path) -> PlanGraph:
    return plan(model_dir=model, output_dir=model.parent / "out").graph()


def dot_that(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Have a program `dot` on PATH that runs a shell script."""
    program = directory / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(graph_drawing.shutil, "which", lambda name: str(directory / name))


def test_each_kind_of_file(model: Path, graph: PlanGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_drawing.shutil, "which", lambda _: None)
    expected = {"plan.dot": graph.to_dot(), "plan.svg": graph.to_svg(), "Plan.HTML": page(graph)}
    for name, text in expected.items():
        (tmp_path / name).write_text("of an earlier plan")
        ran = headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--graph", tmp_path / name)
        assert (ran.code, ran.err) == (0, "")
        assert (tmp_path / name).read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"model", *expected}


def test_the_line_is_printed(model: Path, graph: PlanGraph) -> None:
    ran = headrace("plan", "--model_dir", model, "--output_dir", model.parent / "out")
    assert graph.line() in ran.out


@pytest.mark.parametrize("name", ["plan.png", "plan", "none/plan.svg", "model", "folder.svg"])
def test_other_files_are_refused_before_anything_is_written(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    before = tree(tmp_path)
    ran = headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--graph", tmp_path / name)
    assert ran.code == 2
    assert "--graph" in ran.err
    assert tree(tmp_path) == before


def test_a_plan_that_is_refused_draws_nothing(model: Path, tmp_path: Path) -> None:
    arguments = ("--model_dir", model, "--output_dir", tmp_path / "out", "--tp_size", 7, "--graph", tmp_path / "plan.svg")
    assert headrace("plan", *arguments).code == 2
    assert not (tmp_path / "plan.svg").exists()


def test_a_file_that_cannot_be_written_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "plan.dot").write_text("of an earlier plan")
    monkeypatch.setattr(Path, "replace", full)
    ran = headrace("plan", "--model_dir", model, "--output_dir", tmp_path / "out", "--graph", tmp_path / "plan.dot")
    assert ran.code == 3
    assert "No space left on device" in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "plan.dot"}
    assert (tmp_path / "plan.dot").read_text() == "of an earlier plan"


def test_dot_draws_where_it_is_there(graph: PlanGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = '<svg xmlns="http://www.w3.org/2000/svg"><g class="graph"/></svg>'
    dot_that(monkeypatch, tmp_path, f"cat > {tmp_path}/given; echo '{drawn}'")
    made = picture(graph)
    assert (tmp_path / "given").read_text() == graph.to_dot()
    assert [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(made)] == ["style", "g"]
    assert "prefers-color-scheme: dark" in made


@pytest.mark.parametrize("script", ["exit 1", "echo no picture", "printf '\\377'"])
def test_a_dot_that_does_not_work_is_as_none(
    script: str, graph: PlanGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot_that(monkeypatch, tmp_path, script)
    assert picture(graph) == graph.to_svg()


def test_text_of_files_is_text_in_the_page() -> None:
    made = page(hostile())
    assert "<script" not in made
    assert made.count("&lt;script&gt;") >= 4
    made.encode()
