"""Numbers with their units, for people: sizes in binary units, as file managers show them, rates in decimal ones, as disks do."""

from __future__ import annotations

from pipeline.tensor.units import human_bytes

__all__ = ["human_bytes", "human_rate", "part_of"]


def human_rate(bytes_per_second: float) -> str:
    """Format bytes per second with a decimal unit: `850 kB/s`, `71.4 MB/s`, `1.52 GB/s`."""
    if bytes_per_second < 1e6:
        return f"{bytes_per_second / 1e3:.0f} kB/s"
    return f"{bytes_per_second / 1e6:.1f} MB/s" if bytes_per_second < 1e9 else f"{bytes_per_second / 1e9:.2f} GB/s"


def part_of(done: float, total: float) -> str:
    """Format bytes as a part of others, in the unit of these and as wide whatever the part: ` 12.5 of 523.2 MiB`."""
    number, unit = human_bytes(total).split()
    scale = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    return f"{done / scale:{len(number)}.{0 if unit == 'B' else 1}f} of {number} {unit}"
