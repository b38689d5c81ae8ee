"""Paths as they were typed: a relative path of the command line is printed as it is there, though work is done on absolute ones."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

BOUND = r"(?![\w.-])"  # behind a path: the next folder, the end, or a sign


def as_typed(text: str) -> str:
    """A text with the absolute paths of the command line's relative ones as these are."""
    for path, word in sorted(_typed(), key=lambda pair: -len(pair[0])):
        text = word.join(re.split(rf"(?<![\w/.-]){re.escape(path)}{BOUND}", text))
    return text


def _typed() -> Iterator[tuple[str, str]]:
    """Each word of the command line that may be a relative path, with the path that it is."""
    for argument in sys.argv[1:]:
        word = argument.partition("=")[2] if argument.startswith("-") else argument
        if word and "://" not in word and not Path(word).is_absolute() and not word.startswith("~"):
            path = os.path.abspath(word)  # noqa: PTH100 (links stay as they are)
            if path != os.path.abspath(os.sep):  # noqa: PTH100
                yield path, word.rstrip("/") or word
