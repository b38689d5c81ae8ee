"""Comparing output directories."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but headrace.json, which holds times; of a note of who is at work the name alone."""
    files = (path for path in directory.iterdir() if path.name != "headrace.json")
    return {path.name: b"" if path.is_symlink() else path.read_bytes() for path in files}


def values_bytes(directory: Path) -> int:
    """The bytes of the rank files in and below a directory without their headers, padding included."""
    total = 0
    for path in directory.rglob("rank*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def tensors(directory: Path) -> dict[str, dict[str, object]]:
    """The tensors of every rank."""
    return {path.name: dict(load_file(path)) for path in sorted(directory.glob("*.safetensors"))}
