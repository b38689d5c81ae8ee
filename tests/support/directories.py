"""Comparing output directories."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but headrace.json, which holds times."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "headrace.json"}


def tensors(directory: Path) -> dict[str, dict[str, object]]:
    """The tensors of every rank."""
    return {path.name: dict(load_file(path)) for path in sorted(directory.glob("*.safetensors"))}
