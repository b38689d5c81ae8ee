"""Read texts, one after the other: lines, or `text` (or `article`, `content`) of a file of JSON lines or in Parquet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.documents import open_regular, parse_json
from pipeline.errors import BadInput, Problem
from pipeline.tensor.source_file import SourceFile, source_file

KEYS = ("text", "article", "content")
LINES = (".jsonl", ".ndjson")
FETCH = (
    "Of a public data set, which is not fetched here, give a file: `hf download --repo-type dataset NAME --local-dir DIR` "
    "(of huggingface_hub) fetches all of one"
)
PARQUET = ".parquet"
ROWS = 64  # that are read at once
MAX_LINE_BYTES = 16 << 20  # of which no more is read at once
HEAD_BYTES = 64 << 10


def texts_file(path: Path) -> SourceFile:
    """The file as it is. Raises BadInput where there is none that can be read."""
    try:
        with open_regular(path) as file:
            return source_file(path, os.fstat(file.fileno()), file.read(HEAD_BYTES))
    except OSError as error:
        found = f"a file that cannot be read ({error.strerror})"
        raise BadInput([Problem(str(path), found, "a file of lines, of JSON lines, or in Parquet", FETCH)]) from None


def texts(path: Path) -> Iterator[str]:
    """Yield the texts that are not empty. Raises BadInput naming a line that holds none, or a file in Parquet without texts."""
    if path.suffix == PARQUET:
        yield from _of_columns(path)
        return
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


def _of_columns(path: Path) -> Iterator[str]:
    """The texts of a file in Parquet, a batch of rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        remedy = "pip install 'headrace[calibrate]', or give a file of lines or of JSON lines"
        raise BadInput(
            [Problem(str(path), f"pyarrow is not installed ({error})", "the package that reads Parquet", remedy)]
        ) from None
    expected = f"Parquet with a column of texts: {' or '.join(KEYS)}"
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            key = next((key for key in KEYS if key in names), None)
            if key is None:
                raise BadInput([Problem(str(path), f"columns {', '.join(names) or 'of no name'}", expected)])
            for batch in file.iter_batches(batch_size=ROWS, columns=[key]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise BadInput([Problem(f"{path}: {key}", f"values of type {type(text).__name__}", "texts")])
                    if text and text.strip():
                        yield text
    except (ArrowException, OSError) as error:
        raise BadInput(
            [Problem(str(path), f"no Parquet that can be read ({str(error).partition(chr(10))[0]})", expected)]
        ) from None
