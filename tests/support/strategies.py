"""Hypothesis strategies that several test modules use."""

from __future__ import annotations

from hypothesis import strategies as st

from pipeline.tensor.placement import Region


def shapes(least: int = 1, most: int = 3, longest: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of `least` to `most` axes, none of them empty."""
    return st.lists(st.integers(1, longest), min_size=least, max_size=most).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...], least: int = 1) -> Region:
    """A region of an array of `shape`, of at least `least` elements an axis."""
    region = []
    for size in shape:
        start = draw(st.integers(0, size - least))
        region.append((start, draw(st.integers(start + least, size))))
    return tuple(region)
