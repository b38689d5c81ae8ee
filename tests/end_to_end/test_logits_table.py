"""The README's table of what a trained model says after each quantization, and docs/calibration.md's of AWQ's search, are true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.logits_table import BY_ROW, LINEARS, NEAREST, SEARCHED, WAYS, Said, measured
from tests.support.places import DOCS, ROOT
from tests.support.places import SMOLLM2 as MODEL

README = (ROOT / "README.md").read_text()
DOCUMENT = (DOCS / "calibration.md").read_text()
# Sums in another order move what is near a tie.
SHARE, DIVERGENCE = 0.03, 0.1


def table(text: str, head: str) -> dict[str, list[str]]:
    """The rows of the table whose head begins so, by their first cell."""
    lines = text[text.index(f"| {head} |") :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {row[0]: row[1:] for row in rows}


def test_the_documents_have_the_tables() -> None:
    said = table(README, "converted as")
    assert list(said) == [way.title for way in WAYS]
    assert list(table(DOCUMENT, "linears")) == [f"`{linear}`" for linear in LINEARS]
    divergences = {name: [float(cell) for cell in cells] for name, cells in table(DOCUMENT, "quantized as").items()}
    assert list(divergences) == [SEARCHED, NEAREST, BY_ROW]
    for place in range(2):
        assert divergences[SEARCHED][place] < divergences[NEAREST][place] < divergences[BY_ROW][place]
    assert all(float(cell) < 1 for cells in table(DOCUMENT, "linears").values() for cell in cells)
    first = {name: int(cells[1].split()[0]) for name, cells in said.items()}
    assert first[SEARCHED] > first[NEAREST] > first[BY_ROW]


@pytest.mark.nightly
def test_the_tables_are_measured(tmp_path: Path) -> None:
    assert MODEL.exists(), "run the tests with `make nightly`, which fetches the model"
    shares, found = measured(MODEL, tmp_path)
    for linear, cells in table(DOCUMENT, "linears").items():
        values = shares[linear.strip("`")]
        assert len(values) == 30
        assert np.median(values) == pytest.approx(float(cells[0]), abs=SHARE), linear
        assert values.max() == pytest.approx(float(cells[1]), abs=SHARE), linear
        assert values.max() < 1
    by_title = {each.way.title: each for each in found}
    for title, cells in table(DOCUMENT, "quantized as").items():
        each = by_title[title]
        assert [each.divergence, each.other_divergence] == pytest.approx([float(cell) for cell in cells], rel=DIVERGENCE)
    for title, cells in table(README, "converted as").items():
        check(by_title[title], cells)


def check(each: Said, cells: list[str]) -> None:
    snr, same, largest, goes_on = cells
    title = each.way.title
    if each.snr is None:
        assert snr == "no error", title
    else:
        assert each.snr == pytest.approx(float(snr.split()[0]), abs=0.3), title
    stated_same, tokens = map(int, same.split(" of "))
    assert tokens == each.tokens
    assert abs(stated_same - each.same) <= 1, title  # a token near a tie falls as the processor's sums have it
    stated = re.match(r"([\d.]+) %", largest)
    assert stated, largest
    assert 100 * each.largest == pytest.approx(float(stated[1]), rel=0.1, abs=0.05), title
    if each.same != stated_same:
        return
    beginning = goes_on.strip('"').removesuffix(", ...").removesuffix("...").strip()
    assert each.text.startswith(beginning), (title, each.text)
