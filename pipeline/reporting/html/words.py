"""Format numbers and text of files for people."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Sequence

from pipeline.printed import many
from pipeline.tensor.units import human_bytes

# Unicode categories: controls, halves of surrogate pairs, and characters that turn the direction of the text around them.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SHOWN_NAMES = 6
_UNIT = "\N{NO-BREAK SPACE}"  # between a number and its unit
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def visible(text: str) -> str:
    """Escape the characters of a text that are invisible, or that change how others are shown."""
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or unicodedata.category(c) not in _HIDDEN else ascii(c)[1:-1] for c in text)


def count(number: int, noun: str) -> str:
    """`1 tensor`, `2,000 tensors`."""
    return many(number, noun)


def figure(value: float | None) -> str:
    """A measured number in three digits; a dash for none."""
    return DASH if value is None else f"{value:.3g}"


def decibels(value: float) -> str:
    """A ratio of signal to noise with one decimal."""
    return f"{value:.1f}{_UNIT}dB" if math.isfinite(value) else str(value)


def percent(share: float) -> str:
    """A share of 1 as a percentage with one decimal; a smaller one that is not 0 as "< 0.1 %"."""
    if 0 < share < 0.0005:
        return f"< 0.1{_UNIT}%"
    return f"{share * 100:.1f}{_UNIT}%"


def size(nbytes: float) -> str:
    """Bytes in binary units."""
    return human_bytes(nbytes).replace(" ", _UNIT)


def duration(seconds: float) -> str:
    """Seconds as milliseconds, seconds, minutes or hours."""
    if not math.isfinite(seconds) or seconds <= 0:
        return f"0{_UNIT}s" if seconds == 0 else str(seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g}{_UNIT}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}{_UNIT}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min")) if hours else ((minutes, "min"), (rest, "s"))
    return " ".join(f"{number}{_UNIT}{unit}" for number, unit in parts)


def rate(nbytes: float, seconds: float) -> str:
    """The speed in GB/s; "" where the time is too short to tell."""
    return f"{nbytes / seconds / 1e9:.2f}{_UNIT}GB/s" if seconds >= 1e-4 and nbytes else ""


def runs(numbers: Sequence[int]) -> str:
    """`0, 2–5` for 0, 2, 3, 4, 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}{DASH}{part[-1]}" for part in parts)


def together(names: Sequence[str]) -> str:
    """Join names, with their common parts once: `model.layers.0.self_attn.{q_proj, k_proj}.weight`; of many, the first six."""
    if len(names) < 2:
        return "".join(names)
    words = [name.split(".") for name in names]
    head = _alike(words)
    tail = min(_alike([parts[::-1] for parts in words]), min(map(len, words)) - head)
    middles = [".".join(parts[head : len(parts) - tail]) for parts in words]
    more = f", … {len(middles) - _SHOWN_NAMES} more" if len(middles) > _SHOWN_NAMES else ""
    inside = f"{{{', '.join(middles[:_SHOWN_NAMES])}{more}}}"
    return ".".join([*words[0][:head], inside, *words[0][len(words[0]) - tail :]])


def _alike(names: Sequence[Sequence[str]]) -> int:
    """The number of first words that all names have in common."""
    return sum(1 for _ in itertools.takewhile(lambda at: len(set(at)) == 1, zip(*names, strict=False)))
