"""`headrace build` as the tests call it, and what they ask of its outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.commands import Ran, headrace


def build(checkpoint: object, engine: object, *more: object) -> Ran:
    return headrace("build", checkpoint, "--output_dir", engine, "--scheduler", "threads", *more)


def provenance(engine: Path) -> dict[str, Any]:
    return json.loads((engine / "headrace.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
