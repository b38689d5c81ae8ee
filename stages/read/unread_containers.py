"""Directories in a form that is known and not read: one problem says what it is and what makes a readable checkpoint of it.

The forms are data, in `configs/formats/containers.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.model.table_files import load_table
from pipeline.model.tables import CONFIGS

_READ = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "consolidated.*.pth")


def unread_container(location: Path) -> Problem | None:
    """Return the problem of a directory that is known and not read; None for any other, and where it has weights that are read."""
    if not location.is_dir():
        return None
    readable = _files(location, _READ)
    for row in _containers().values():
        if readable - _files(location, row.get("own", ())):
            continue
        patterns = row.get("any", ())
        found = next((each for pattern in patterns for each in sorted(location.glob(pattern))), None)
        if "all" in row:
            each_of = [next(iter(sorted(location.glob(pattern))), None) for pattern in row["all"]]
            found = each_of[0] if all(each_of) else None
        if found is not None:
            shown = f"{found.relative_to(location)}, a file of {row['title']}"
            return Problem(str(location), shown, "a checkpoint that headrace reads", row["remedy"])
    return None


def _files(location: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in location.glob(pattern) if path.is_file()}


@cache
def _containers() -> dict[str, Any]:
    return load_table(CONFIGS / "formats", "containers")
