"""docs/adding-a-format.md: its code is the toy's, which tests/end_to_end/test_extensions.py converts with, and all of it."""

from __future__ import annotations

import re

import pytest

from pipeline.extensions import members
from stages.quantization.packed_format import PackedFormat, PackedParameter
from stages.quantization.sources import GROUP as FORMATS
from stages.read import GROUP as SOURCES
from stages.read.source_reader import SourceReader
from tests.support.extensions import TOY, toy_entry_points
from tests.support.places import DOCS

DOCUMENT = (DOCS / "adding-a-format.md").read_text()


def blocks() -> dict[str, str]:
    """The document's code, by the name of the file that the line before it gives."""
    return dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL))


def test_every_file_of_the_toy_is_in_the_document() -> None:
    assert blocks().keys() == {path.name for path in TOY.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", sorted(path.name for path in TOY.iterdir() if path.is_file()))
def test_the_code_is_what_runs(name: str) -> None:
    assert blocks()[name] == (TOY / name).read_text()


def test_there_is_no_other_code() -> None:
    assert DOCUMENT.count("```") == 2 * len(blocks())


@pytest.mark.parametrize("protocol", [PackedFormat, SourceReader])
def test_everything_that_a_protocol_asks_for_is_explained(protocol: type) -> None:
    for name in members(protocol):
        assert re.search(rf"^\| `{name}\b", DOCUMENT, re.MULTILINE), name


def test_what_a_packed_parameter_says_is_explained() -> None:
    assert all(f"`{name}`" in DOCUMENT for name in PackedParameter.__dataclass_fields__)


def test_the_groups_of_entry_points() -> None:
    assert toy_entry_points().keys() == {FORMATS, SOURCES}
    assert all(f"`{group}`" in DOCUMENT for group in (FORMATS, SOURCES))
