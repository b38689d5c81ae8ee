"""Read the TOML files of tables: families and layouts, which may extend one another, formats and flags."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def load_table(folder: Path, name: str) -> dict[str, Any]:
    """Read `{name}.toml` of a folder of `configs`, merged with the file that it extends.

    Raises FileNotFoundError where there is no such file.
    """
    data = tomllib.loads((folder / f"{name}.toml").read_text())
    parent_name = data.pop("extends", None)
    if parent_name is None:
        return data
    parent = load_table(folder, parent_name)
    if folder.name == "layouts" and "config" in data:
        parent.pop("config")  # a layout's template is never merged, as its keys have the order of NVIDIA's converter
    merged = merge(parent, data)
    for pattern in merged.pop("remove", ()):
        merged["modules" if folder.name == "layouts" else "rename"].pop(pattern)
    return merged


def tables_with(folder: Path, words: str) -> Iterator[str]:
    """Yield the names of the files of a folder that have `words` in them themselves, in order; the others need not be parsed."""
    for path in sorted(folder.glob("*.toml")):
        if words in path.read_text():
            yield path.stem


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `over`; tables in both are merged key by key, and new keys come last."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result
