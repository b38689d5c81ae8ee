"""One look: the page, the report, the page of a graph and its picture have the same colours, and follow dark mode."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import plan
from pipeline.planning import graph_svg
from pipeline.reporting.graph_drawing import page
from pipeline.reporting.html import describe_directory, render_report
from pipeline.watching.live import document
from pipeline.watching.look import look
from tests.support import checkpoints
from tests.support.places import ROOT

SHEETS = ("configs/page/page.css", "configs/report/page.css", "configs/report/figures.css")


def colours(style: str) -> dict[str, list[str]]:
    """{name: its values, the light one first} of the variables that a style sheet sets to a colour."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style):
        found.setdefault(name, []).append(value)
    return found


def test_each_page_has_the_look(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.LLAMA)
    made = plan(model_dir=tmp_path / "model", output_dir=tmp_path / "out")
    for text in (document(""), render_report(describe_directory(tmp_path)), page(made.graph())):
        assert look().strip() in text
        assert '<meta name="color-scheme" content="light dark">' in text


def test_a_colour_is_light_and_dark() -> None:
    found = colours(look())
    assert len(found) > 15
    assert {name: len(values) for name, values in found.items() if len(values) != 2} == {}


def test_a_picture_of_a_graph_has_its_colours() -> None:
    ours, shared = colours(graph_svg.STYLE), colours(look())
    assert len(ours) == 7
    assert ours == {name: shared[name] for name in ours}


@pytest.mark.parametrize("sheet", SHEETS)
def test_other_sheets_set_no_colour_of_the_look(sheet: str) -> None:
    assert not set(colours((ROOT / sheet).read_text())) & set(colours(look()))
