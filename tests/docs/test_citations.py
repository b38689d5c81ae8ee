"""Code, tables, tests and pages cite docs/format in one form, and each citation leads to a heading."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.support.citations import FOLDER, Citation, citations, headings, other_forms, own_citations, unresolved

ROOT = Path(__file__).parents[2]
# They hold examples of what is wrong.
THESE = ("tests/docs/test_citations.py", "tests/support/citations.py")
PAGES = {path.name: headings(path.read_text()) for path in (ROOT / FOLDER).glob("*.md")}


@cache
def files() -> tuple[str, ...]:
    """Code, tables and pages that git tracks."""
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in tracked.stdout.splitlines() if not name.startswith("tests/data/") and name not in THESE]
    return tuple(name for name in names if (ROOT / name).exists())


def texts(*, pages: bool) -> dict[str, str]:
    return {name: (ROOT / name).read_text() for name in files() if name.startswith(FOLDER) == pages}


def test_pages_have_numbered_sections() -> None:
    assert set(PAGES) == {"README.md", "checkpoint.md", "families.md", "quantized-layouts.md", "runtime-1.2.md"}
    assert PAGES["checkpoint.md"] == [str(number) for number in range(1, 14)]
    fourth = ["4", *(f"4{letter}" for letter in "abcde")]
    assert PAGES["quantized-layouts.md"] == [
        "1",
        "2",
        "3",
        *fourth,
        "5",
        "5b",
        "6",
        "7",
        "8",
        "9",
        "9b",
        "9c",
        "10",
        "11",
        "12",
        "13",
        "14",
    ]
    assert PAGES["families.md"] == [str(number) for number in range(1, 15)]
    assert PAGES["runtime-1.2.md"][:7] == ["a", "b", "b2", "b3", "b4", "c", "c2"]
    for sections in PAGES.values():
        assert len(sections) == len(set(sections)), "each number once"


def test_every_citation_leads_to_a_heading() -> None:
    found = {name: citations(text) for name, text in texts(pages=False).items()}
    wrong = {name: problems for name, each in found.items() if (problems := list(unresolved(each, PAGES)))}
    assert not wrong
    assert sum(len(each) for each in found.values()) >= 50, "they were found at all"
    assert {citation.page for each in found.values() for citation in each} >= {
        "checkpoint.md",
        "quantized-layouts.md",
        "families.md",
    }


def test_there_is_no_other_form() -> None:
    wrong = {name: found for name, text in texts(pages=False).items() if (found := other_forms(text))}
    assert not wrong, f"cite as ({FOLDER}PAGE.md, section N)"


def test_pages_cite_one_another_rightly() -> None:
    found = {name: own_citations(text, Path(name).name) for name, text in texts(pages=True).items()}
    wrong = {name: problems for name, each in found.items() if (problems := list(unresolved(each, PAGES)))}
    assert not wrong
    assert sum(len(each) for each in found.values()) >= 15


@pytest.mark.parametrize(
    ("text", "page", "sections"),
    [
        ("(docs/format/checkpoint.md, section 12)", "checkpoint.md", "12"),
        ("docs/format/quantized-layouts.md, sections 5 to 7 and 9b, read", "quantized-layouts.md", "5 6 7 9b"),
        ("docs/format/quantized-layouts.md, sections 5 to 9b", "quantized-layouts.md", "5 6 7 8 9 9b"),
        ("docs/format/quantized-layouts.md, sections 4b, 4c, 7 and 8.", "quantized-layouts.md", "4b 4c 7 8"),
        ("docs/format/quantized-layouts.md, sections 1, 4 to 8. Weights", "quantized-layouts.md", "1 4 5 6 7 8"),
        ("# docs/format/checkpoint.md,\n    # section\n# 2, quirk 1", "checkpoint.md", "2"),
        ("docs/format/checkpoint.md, sections 1, 5 and 6, and more", "checkpoint.md", "1 5 6"),
        ("docs/format/runtime-1.2.md, sections b2, c and h1.", "runtime-1.2.md", "b2 c h1"),
        ("docs/format/families.md; and", "families.md", ""),
    ],
)
def test_a_citation_is_read(text: str, page: str, sections: str) -> None:
    assert citations(text) == [Citation(page, tuple(sections.split()))]
    assert other_forms(text) == []
    assert list(unresolved(citations(text), PAGES)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("docs/format/layouts.md, section 1", "no page docs/format/layouts.md"),
        ("docs/format/checkpoint.md, section 99", "no section 99 in docs/format/checkpoint.md"),
        ("docs/format/checkpoint.md, sections 12 to 14", "no section 14 in docs/format/checkpoint.md"),
        ("docs/format/quantized-layouts.md, section 4f", "no section 4f in docs/format/quantized-layouts.md"),
        ("docs/format/runtime-1.2.md, section z", "no section z in docs/format/runtime-1.2.md"),
        ("docs/format/checkpoint.md,\nsections 2 and\n99", "no section 99 in docs/format/checkpoint.md"),
    ],
)
def test_a_citation_of_nothing_is_found(text: str, problem: str) -> None:
    assert list(unresolved(citations(text), PAGES)) == [problem]


@pytest.mark.parametrize(
    "text",
    [
        "(checkpoint-format, section 12)",
        "Facts: TensorRT-LLM checkpoint format, section 1.",
        "Facts: quantized layouts, sections 5 to 7.",
        "(quantized layouts, section\n9)",
        "(checkpoint format, families, quantized layouts)",
        "rounded there (families, Gemma).",
        "section 3's steps",
        "# Sections 2\n# and 12: what",
    ],
)
def test_another_form_is_found(text: str) -> None:
    assert other_forms(text)


@pytest.mark.parametrize(
    "text", ["a section of config.json", "the checkpoint format as it is", "headrace families, and formats", "section.facts"]
)
def test_other_words_are_no_citation(text: str) -> None:
    assert other_forms(text) == []
    assert citations(text) == []
