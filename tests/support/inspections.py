"""Of `headrace inspect`: its JSON and its table as values, and the facts that any unpacked source has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.commands import headrace, tree


def inspected(path: Path) -> dict[str, Any]:
    """What `inspect --json` says; the directory is as it was."""
    before = tree(path.parent)
    ran = headrace("inspect", path, "--json")
    assert (ran.code, ran.err) == (0, ""), ran
    assert tree(path.parent) == before
    return json.loads(ran.out)


def table(path: Path) -> dict[str, list[str]]:
    """What `inspect` prints: the rows by their label, a row that was wrapped in one line again."""
    ran = headrace("inspect", path)
    assert (ran.code, ran.err) == (0, ""), ran
    lines = ran.out.rstrip().splitlines()
    start = next(line.index(word) for line in lines for word in [line.split(maxsplit=1)[1]] if line.startswith("path"))
    found: dict[str, list[str]] = {}
    label = ""
    for line in lines:
        head, text = line[:start].strip(), line[start:].strip()
        if head:
            label = head
            found.setdefault(label, []).append(text)
        else:
            found[label][-1] += f" {text}"
    return found


def facts(source: dict[str, np.ndarray]) -> dict[str, Any]:
    """What any unpacked source says of its tensors."""
    by_type: dict[str, int] = {}
    for array in source.values():
        name = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[array.dtype.name]
        by_type[name] = by_type.get(name, 0) + array.nbytes
    return {
        "tensors": len(source),
        "parameters": sum(array.size for array in source.values()),
        "bytes": sum(array.nbytes for array in source.values()),
        "bytes_by_dtype": by_type,
    }
