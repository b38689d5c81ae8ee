"""The charts of a conversion's page as HTML: lines over time in SVG, and rows with bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.printed import in_html
from pipeline.watching.units import human_bytes, human_rate

WIDTH, HEIGHT = 620, 190
LEFT, RIGHT, TOP, BOTTOM = 88, 12, 10, 24  # of the space round the lines
MOST_POINTS = 200  # of a line


def timeline(
    title: str, points: Sequence[tuple[float, float]], *, colour: str, rate: bool = False, limit: float | None = None
) -> str:
    """Return a line chart of bytes over the seconds of a run, as a section of the page.

    Parameters
    ----------
    points
        (seconds since the start, bytes) in the order of time.
    colour
        The class of the line: `blue` or `teal`.
    rate
        The values are bytes per second, and their units decimal.
    limit
        Where a dashed line is drawn, in bytes; None for none.
    """
    seconds = max([1.0, *(x for x, _ in points)])
    ceiling = _ceiling(max([1.0, limit or 0.0, *(y for _, y in points)]) * 1.1, decimal=rate)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def height(value: float) -> float:
        return TOP + down * (1 - value / ceiling)

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = height(ceiling * share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = (human_rate if rate else human_bytes)(ceiling * share) if share else "0"
        parts.append(f'<text class="soft" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{label}</text>')
    for share in (0.0, 0.5, 1.0):
        anchor = ("start", "middle", "end")[round(share * 2)]
        x = LEFT + across * share
        parts.append(f'<text class="soft" text-anchor="{anchor}" x="{x:.1f}" y="{HEIGHT - 6}">{clock(seconds * share)}</text>')
    if len(points) > 1:
        line = " ".join(f"{LEFT + across * x / seconds:.1f},{height(y):.1f}" for x, y in thinned(points))
        start, end = (LEFT + across * points[place][0] / seconds for place in (0, -1))
        area = f"{start:.1f},{height(0):.1f} {line} {end:.1f},{height(0):.1f}"
        parts.append(f'<polygon class="area {colour}" points="{area}"/><polyline class="line {colour}" points="{line}"/>')
    if limit:
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height(limit):.1f}" y2="{height(limit):.1f}"/>')
    drawing = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{in_html(title)}">{"".join(parts)}</svg>'
    return f"<section><h2>{in_html(title)}</h2>{drawing}</section>"


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return at most MOST_POINTS points, each with the mean of those that it stands for, the last as it is."""
    step = math.ceil(len(points) / MOST_POINTS)
    if step <= 1:
        return points
    parts = [points[place : place + step] for place in range(0, len(points) - 1, step)]
    means = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
    return [*means[: MOST_POINTS - 1], points[-1]]


def clock(seconds: float) -> str:
    """Format seconds for an axis: `0:07`, `1:02:03`."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60}:{whole % 60:02}"
    return minutes if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def bar_rows(title: str, rows: Sequence[tuple[str | tuple[str, str], float, str]], *, colour: str) -> str:
    """Return a table with a bar in each row, as a section. `rows`: (name or (group, name), share from 0 to 1, text)."""
    lines = []
    last = ""
    for name, share, text in rows:
        group, own = ("", name) if isinstance(name, str) else name
        shown, last = ("" if group == last else group), group
        heads = (f'<th class="of">{in_html(shown)}</th>' if not isinstance(name, str) else "") + f"<th>{in_html(own)}</th>"
        bar = f'<div class="bar {colour}"><div style="width:{100 * min(share, 1.0):.1f}%"></div></div>'
        lines.append(f'<tr>{heads}<td class="long">{bar}</td><td>{in_html(text)}</td></tr>')
    body = f'<table class="rows">{"".join(lines)}</table>' if lines else '<p class="sub">none yet</p>'
    return f'<section class="wide"><h2>{in_html(title)}</h2>{body}</section>'


def _ceiling(value: float, decimal: bool) -> float:
    """Round up to a multiple of a fifth of the largest power of ten that is at most `value`, or of a quarter of that of two."""
    step = 10.0 ** math.floor(math.log10(value)) / 5 if decimal else 2.0 ** (math.floor(math.log2(value)) - 2)
    return math.ceil(value / step) * step
