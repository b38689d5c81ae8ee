"""The look of all pages and of the report: one style sheet of colours, light and dark, fonts, cards and charts."""

from __future__ import annotations

from functools import cache

from pipeline.model.tables import CONFIGS


@cache
def look() -> str:
    """The text of the style sheet."""
    return (CONFIGS / "look" / "look.css").read_text()
