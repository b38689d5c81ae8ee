"""Read texts, one after the other: the lines of a file, or `text` (or `article`, `content`) of the objects of a JSON Lines file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.documents import open_regular, parse_json
from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile, source_file

KEYS = ("text", "article", "content")
LINES = (".jsonl", ".ndjson")
MAX_LINE_BYTES = 16 << 20  # of which no more is read at once
HEAD_BYTES = 64 << 10


def texts_file(path: Path) -> SourceFile:
    """The file as it is. Raises BadInput where there is none that can be read."""
    try:
        with open_regular(path) as file:
            return source_file(path, os.fstat(file.fileno()), file.read(HEAD_BYTES))
    except OSError as error:
        found = f"a file that cannot be read ({error.strerror})"
        raise BadInput([Problem(str(path), found, "a file of texts, or of JSON lines")]) from None


def texts(path: Path) -> Iterator[str]:
    """Yield the texts that are not empty. Raises BadInput naming a line that holds none."""
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            try:
                text = line.decode("utf-8")
                text = _of_object(text) if path.suffix in LINES and text.strip() else text
            except ValueError as error:
                found, expected = f"what is no text ({error})", f"UTF-8; in a file of JSON lines objects with {' or '.join(KEYS)}"
                raise BadInput([Problem(f"{path}: line {number}", found, expected)]) from None
            if text.strip():
                yield text


def _of_object(line: str) -> str:
    value = parse_json(line)
    held = value if isinstance(value, dict) else {}
    found: str | None = next((held[key] for key in KEYS if isinstance(held.get(key), str)), None)
    if found is None:
        raise ValueError("a line without one")
    return found
