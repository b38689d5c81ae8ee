"""Match module names with numbers, such as `layers.3.mlp`, against patterns with placeholders, such as `layers.{layer}.mlp`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

_NUMBER = re.compile(r"(?<=\.)([0-9]+)(?=\.|$)")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

T = TypeVar("T")


class PatternTable(Generic[T]):
    """Rows by pattern, which a concrete name finds with one dictionary look-up."""

    def __init__(self, rows: Iterable[tuple[str, T]]) -> None:
        self._rows = {_PLACEHOLDER.sub("{}", pattern): (tuple(_PLACEHOLDER.findall(pattern)), row) for pattern, row in rows}

    def find(self, name: str) -> tuple[T, dict[str, int]] | None:
        """Return the row whose pattern matches `name`, and the numbers at its placeholders by their names; None where none does."""
        parts = _NUMBER.split(name)  # texts and, between them, numbers
        match, numbers = self._rows.get("{}".join(parts[::2])), parts[1::2]
        if match is None:
            return None
        names, row = match
        # A name that itself holds "{}" has fewer numbers than the pattern has placeholders.
        if len(names) != len(numbers) or any(len(number) > 9 for number in numbers):
            return None
        return row, dict(zip(names, map(int, numbers), strict=True))
