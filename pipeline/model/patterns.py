"""Match module names with numbers, such as `layers.3.mlp`, against patterns with placeholders, such as `layers.{layer}.mlp`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

_PLACEHOLDER = re.compile(r"\{(\w+)\}")

T = TypeVar("T")


class PatternTable(Generic[T]):
    """Rows by pattern, which a concrete name finds with one dictionary look-up."""

    def __init__(self, rows: Iterable[tuple[str, T]]) -> None:
        self._rows = {_PLACEHOLDER.sub("{}", pattern): (tuple(_PLACEHOLDER.findall(pattern)), row) for pattern, row in rows}

    def find(self, name: str) -> tuple[T, dict[str, int]] | None:
        """Return the row whose pattern matches `name`, and the numbers at its placeholders by their names; None where none does."""
        first, *rest = name.split(".")
        numbers = [part for part in rest if part.isdigit() and part.isascii()]
        match = self._rows.get(".".join((first, *("{}" if part.isdigit() and part.isascii() else part for part in rest))))
        if match is None:
            return None
        names, row = match
        # A name that itself holds "{}" has fewer numbers than the pattern has placeholders.
        if len(names) != len(numbers) or max(map(len, numbers), default=0) > 9:
            return None
        return row, dict(zip(names, map(int, numbers), strict=True))
