"""Numbers with their units, as people read them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Bytes for people: binary units, as file sizes and memory limits have them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
