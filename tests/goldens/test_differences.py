"""The table of differences itself: each row has a case, and the documents speak of it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from tests.goldens.differences import DIFFERENCES, Difference, cases, expected_config
from tests.support.places import DOCS

FOLDERS = ("dense", "families", "quantized", "smoothquant")


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: f"{row.cases} {row.key}")
def test_each_difference_is_one_of_some_case_and_is_explained(row: Difference) -> None:
    found = [case for folder in FOLDERS for case in cases(folder) if fnmatchcase(case, row.cases)]
    assert found
    for case in found:
        expected_config(case)  # holds NVIDIA's value against the table's
    text = (DOCS / "architecture.md").read_text()
    assert f"`{row.key.rpartition('.')[2]}`" in text, "not under 'Where headrace and NVIDIA's converter differ'"
