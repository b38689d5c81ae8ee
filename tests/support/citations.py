"""Citations of docs/format in text: `docs/format/PAGE.md, section N`, or `sections N, M and P`, or `sections N to M`.

Pages of docs/format say "section N" of themselves and `PAGE.md, section N` of one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FOLDER = "docs/format/"

# A line break, with the mark of a comment that goes on, is a space.
_BREAK = re.compile(r"[ \t]*\n[ \t]*(?:#+:?[ \t]*)?")
_HEADING = re.compile(r"^#{2,4} ([0-9]+[a-z]?|[a-z][0-9]?)\. ", re.MULTILINE)
_JOIN = r"(?:, and |, | and | to )"
_NUMBERS = rf"(?:[0-9]+[a-z]?(?:{_JOIN}[0-9]+[a-z]?\b)*|[a-z][0-9]?\b(?:{_JOIN}[a-z][0-9]?\b)*)"
_PAGE = r"(?P<page>[\w.-]+\.md)"
_SECTIONS = rf"(?P<word>[Ss]ections?) (?P<numbers>{_NUMBERS})"
_ABSOLUTE = re.compile(rf"{FOLDER}{_PAGE}(?:, {_SECTIONS})?")
_RELATIVE = re.compile(rf"(?:{_PAGE}, )?\b{_SECTIONS}")
# What the pages were called by, and sections of no page.
_OTHER_FORMS = re.compile(
    r"\b[Cc]heckpoint-format\b|\b[Cc]heckpoint format, (?:sections?|families)\b|\b[Qq]uantized layouts ?[,;.)]|"
    r"\b[Ff]amilies, [A-Z][a-z]|; families[;.)]|\b[Ss]ections? [0-9][0-9a-z]*\b"
)


@dataclass(frozen=True)
class Citation:
    """A page of docs/format and, if any are named, its sections. `sections` has every section of a range."""

    page: str
    sections: tuple[str, ...]


def headings(text: str) -> list[str]:
    """The numbers and letters of a page's sections, in their order."""
    return _HEADING.findall(text)


def _range(first: str, last: str) -> list[str]:
    """All that "first to last" names after `first`: the whole numbers to the last one, and that itself."""
    low, high = (int(re.sub(r"\D", "", end)) for end in (first, last))
    return list(dict.fromkeys([*(str(number) for number in range(low + 1, high + 1)), last]))


def _sections(numbers: str) -> tuple[str, ...]:
    parts = re.split(r"(, and |, | and | to )", numbers)
    found = [parts[0]]
    for joined, number in zip(parts[1::2], parts[2::2], strict=True):
        found += _range(found[-1], number) if joined == " to " and number[0].isdigit() else [number]
    return tuple(found)


def _cited(match: re.Match[str], page: str) -> Citation:
    return Citation(page, _sections(match["numbers"]) if match["numbers"] else ())


def citations(text: str) -> list[Citation]:
    """Every citation in the text of a file that is not a page of docs/format."""
    return [_cited(match, match["page"]) for match in _ABSOLUTE.finditer(_BREAK.sub(" ", text))]


def own_citations(text: str, page: str) -> list[Citation]:
    """Every citation in the text of the page `page` of docs/format."""
    return [_cited(match, match["page"] or page) for match in _RELATIVE.finditer(_BREAK.sub(" ", text))]


def other_forms(text: str) -> list[str]:
    """Mentions of a page or of a section's number that are no citation, each with the words around it."""
    joined = _BREAK.sub(" ", text)
    rest = _ABSOLUTE.sub(lambda match: " " * len(match[0]), joined)
    return [joined[max(match.start() - 40, 0) : match.end() + 20].strip() for match in _OTHER_FORMS.finditer(rest)]


def unresolved(found: Sequence[Citation], pages: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Say of each citation which page or section there is not; `pages` has the sections of each page."""
    for citation in found:
        if citation.page not in pages:
            yield f"no page {FOLDER}{citation.page}"
        else:
            yield from (
                f"no section {each} in {FOLDER}{citation.page}" for each in citation.sections if each not in pages[citation.page]
            )
