"""Text that others wrote, made fit to be printed: names and values of checkpoints, paths, the words of errors.

Such text may hold the escape sequences of terminals, line breaks that make a second message of one, characters that turn the
direction of what stands around them, or a hundred kilobytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape

LONGEST = 1000  # characters of one name or value in a message
_TAIL = 200  # of these, from its end: where a file's name stands in a path


def escaped(text: str, keep: str = "") -> str:
    r"""Escape what is not printed as itself: controls, line breaks, marks of direction, halves of surrogate pairs.

    `keep`: characters that stay as they are, such as a line break in a text of several lines. Letters of all scripts are printed as
    themselves, and a backslash is no escape: `C:\new` stays.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


def shortened(text: str, longest: int = LONGEST) -> str:
    """Take the middle out of a text of more than `longest` characters, and say how long it is."""
    if len(text) <= longest:
        return text
    return f"{text[: longest - _TAIL]} [... of {len(text):,} characters ...] {text[-_TAIL:]}"


def printed(text: str) -> str:
    """One name or value as messages have it: of bounded length, then escaped, on one line."""
    return escaped(shortened(text))


def in_html(text: str) -> str:
    """Escape a text for HTML: its markup, and what is not printed as itself, but for line breaks and no-break spaces."""
    return escape(escaped(text, keep="\n\N{NO-BREAK SPACE}"))


def many(count: int, noun: str) -> str:
    """A number of things: `1 file`, `2 files`, `36,945 tensors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class InOneLine(ABC):
    """A value whose repr is one line, and in a notebook a small table: those that derive from it say what stands in both."""

    @abstractmethod
    def _line(self) -> str:
        """Say in a few words what it is."""

    @abstractmethod
    def _rows(self) -> Sequence[tuple[str, str]]:
        """Return its facts as (label, value); those without a value are left out."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {printed(self._line())}>"

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        cells = ((in_html(label), in_html(shortened(value))) for label, value in self._rows() if value)
        rows = "".join(f"<tr><th {left}>{label}</th><td {left}>{value}</td></tr>" for label, value in cells)
        return f"<table><caption {left}>{in_html(type(self).__name__)}</caption>{rows}</table>"
