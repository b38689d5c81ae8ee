"""Format numbers with their units, for people."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Format bytes with a binary unit and one decimal: `512 B`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2,000 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
