"""A console of rich for texts that others wrote: a string is printed as it is, is no markup, and cannot steer the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.printed import escaped


class PlainConsole(Console):
    """A console whose strings, in tables too, are text alone. What is styled is a rich Text, made by headrace itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, soft_wrap=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as rich's Text, whatever `options` say of markup."""
        return super().render_str(escaped(text), **{**options, "markup": False, "emoji": False, "highlight": False})
