"""docs/quantization.md's table of sources is what `headrace formats` says of each."""

from __future__ import annotations

import re

from pipeline.planning.inspection import list_formats
from tests.support.places import DOCS


def rows() -> list[tuple[str, ...]]:
    """The table's rows as the formats themselves have them."""
    return [
        (f"`{row['name']}`", row["is"], ", ".join(f"`{name}`" for name in row["keeps"]) or "numbers (16 bits)", row["proof"])
        for row in list_formats()["quantized"]
    ]


def table() -> str:
    head = ("format", "what it is", "kept as", "its reading was compared with")
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * 4, *rows()))


def test_the_table_is_that_of_the_formats() -> None:
    text = (DOCS / "quantization.md").read_text()
    section = text[text.index("## What a source can be") : text.index("## `--dequantize`")]
    found = re.search(r"(?:^\|.*\|\n)+", section, re.MULTILINE)
    assert found is not None
    assert found[0].strip() == table()
